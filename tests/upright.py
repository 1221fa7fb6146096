"""Upright crops of people with their keypoints, made by the parts of the training data set without augmentation."""

import numpy as np
from torch.utils.data import Dataset

from sapiens_accel.config.schema import DataConfig
from sapiens_accel.data import dataset
from sapiens_accel.data.dataset import Labeled
from sapiens_accel.data.people import People
from sapiens_accel.pose import geometry
from sapiens_accel.pose.skeleton import Skeleton


class UprightPeople(Dataset[Labeled]):
    """Index -> the upright, unchanged crop of a person."""

    def __init__(self, people: People, config: DataConfig, skeleton: Skeleton) -> None:
        self.people, self.config, self.skeleton = people, config, skeleton

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, index: int) -> Labeled:
        row = self.people.rows[index]
        crop = geometry.crop_around_box(np.asarray(row["box_xywh"]), self.config.box_padding, self.config.input_hw)
        view = dataset._view(
            dataset.read_reduced_image(self.people.root / row["file_name"]), crop, self.config.input_hw
        )
        return dataset._with_labels(view, np.asarray(row["keypoints"]), crop, row, self.config, self.skeleton)
