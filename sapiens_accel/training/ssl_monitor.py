"""Stage ssl: rules on its logs and evaluations that warn or stop it, and what is said of it at its end."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sapiens_accel.errors import UserError
from sapiens_accel.evaluation.paired import PairedDifference

IN_A_ROW = 3  # logs: one batch may be odd
LONG = 0.05  # of the stage
COLLAPSED = 0.5  # of the first peak: annotation noise and augmentation move it by a fifth
INFLATED = 1.2  # a target's peak is 1; the decoder's overshoot and noise reach 1.1
SPREAD = 0.3  # of the first spread: one batch's differs from the next by a third
KEEP_RANGE = (0.05, 0.98)
MOVED = 0.01  # in fp32 nearly every weight moves; if updates are rounded away, none does
GRADIENTS = 10.0  # of the unlabeled loss to the labeled one; in balance they are within 0.2 to 2
PRECISION_LOST = 0.03
MIN_ERRORS = 2.0  # standard errors by which a share must differ: with few validation people 0.03 is noise
STUDENT_AHEAD = 0.01  # AP: an average that follows is at least as good as what it averages
AP_LOST = 0.005

# Values of steps with unlabeled people; a stage may end with steps without.
OF_UNLABELED = {"teacher_peak", "teacher_peak_p99", "spread", "keep", "grad_ratio", "not_finite"}


class Stopped(UserError):  # noqa: N818  (not an error of the program)
    """An alarm stops the stage: more steps would make its weights worse."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A condition on logged values that warns, or stops the stage, while `holds(values, first values)` is true.

    Attributes:
        needs: names of the values; a log line without one of them changes nothing.
        says: the message: what is wrong, what it means and what to change; a format of the values and of `first`.
        in_a_row: values in a row for which the condition must hold.
        share: of the stage's steps, those for which it must hold.
        stops: the rule stops the stage.
        harms: the weights that were exported earlier are better than the current ones.
        of_mean_teacher: it is about a teacher that follows the student, not about a fixed one (`--distill.teacher`).
    """

    needs: tuple[str, ...]
    holds: Callable[[Mapping[str, float], Mapping[str, float]], bool]
    says: str
    in_a_row: int = 1
    share: float = 0.0
    stops: bool = False
    harms: bool = False
    of_mean_teacher: bool = False


def _noise_of_precision(now: Mapping[str, float], first: Mapping[str, float]) -> float:
    """How far the precision may fall by chance, or without harm."""
    errors = (values["pseudo_precision_stderr"] for values in (now, first))
    return max(PRECISION_LOST, MIN_ERRORS * math.hypot(*errors))


RULES = (
    Rule(
        needs=("teacher_peak",),
        holds=lambda now, first: now["teacher_peak"] < COLLAPSED * first["teacher_peak"],
        says="teacher_peak {teacher_peak:.3f} is below half of its first {first[teacher_peak]:.3f}: the student learns "
        "the background; lower --ssl.teacher.weight or raise --ssl.teacher.ramp",
        in_a_row=IN_A_ROW,
        stops=True,
        of_mean_teacher=True,
    ),
    Rule(
        needs=("teacher_peak_p99",),
        holds=lambda now, _: now["teacher_peak_p99"] > INFLATED,
        says="teacher_peak_p99 {teacher_peak_p99:.2f} is above 1.2, where targets end at 1: the pseudo-labels raise "
        "the peaks that they are made from; lower --ssl.teacher.weight, and use no loss that sharpens the teacher "
        "alone (--ssl.teacher.loss literal)",
        in_a_row=IN_A_ROW,
        stops=True,
        of_mean_teacher=True,
    ),
    Rule(
        needs=("spread",),
        holds=lambda now, first: now["spread"] < SPREAD * first["spread"],
        says="the teacher's points spread over {spread:.3f} of the crop, at first over {first[spread]:.3f}: it "
        "predicts the same pose for everybody; lower --ssl.teacher.weight or --ssl.optim.lr",
        in_a_row=IN_A_ROW,
        stops=True,
        of_mean_teacher=True,
    ),
    Rule(
        needs=("not_finite",),
        holds=lambda now, _: now["not_finite"] > 0,
        says="the loss or the teacher's peaks are not finite; lower --ssl.optim.lr, or launch with bf16 or fp32",
        in_a_row=IN_A_ROW,
        stops=True,
    ),
    Rule(
        needs=("keep",),
        holds=lambda now, _: now["keep"] < KEEP_RANGE[0],
        says="keep {keep:.3f}, for {steps} steps below 0.05: next to nothing is learned from unlabeled people; lower "
        "--ssl.teacher.threshold",
        in_a_row=IN_A_ROW,
        share=LONG,
    ),
    Rule(
        needs=("keep",),
        holds=lambda now, _: now["keep"] > KEEP_RANGE[1],
        says="keep {keep:.3f}, for {steps} steps above 0.98: the mask leaves out nothing; raise "
        "--ssl.teacher.threshold, or make the strong view harder (--augment.strong_rotation, --ssl.teacher.cutout)",
        in_a_row=IN_A_ROW,
        share=LONG,
    ),
    Rule(
        needs=("ema_moved", "lr"),
        holds=lambda now, _: now["ema_moved"] < MOVED and now["lr"] > 0,
        says="ema_moved {ema_moved:.4f}: the teacher's weights stand still; lower --ssl.teacher.ema_decay or raise "
        "--ssl.optim.lr",
        in_a_row=IN_A_ROW,
    ),
    Rule(
        needs=("grad_ratio",),
        holds=lambda now, _: now["grad_ratio"] > GRADIENTS,
        says="grad_ratio {grad_ratio:.1f}: unlabeled people outweigh the labeled ones more than ten times; lower "
        "--ssl.teacher.weight",
        in_a_row=IN_A_ROW,
    ),
    Rule(
        needs=("pseudo_precision", "pseudo_precision_stderr"),
        holds=lambda now, first: first["pseudo_precision"] - now["pseudo_precision"] > _noise_of_precision(now, first),
        says="pseudo_precision {pseudo_precision:.3f} (standard error {pseudo_precision_stderr:.3f}), first "
        "{first[pseudo_precision]:.3f}: the teacher's labels get worse; raise --ssl.teacher.threshold or lower "
        "--ssl.teacher.weight",
    ),
    Rule(
        needs=("AP", "student_AP"),
        holds=lambda now, _: now["student_AP"] > now["AP"] + STUDENT_AHEAD,
        says="student_AP {percent[student_AP]:.1f} is above the teacher's {percent[AP]:.1f}: the average is too slow; "
        "lower --ssl.teacher.ema_decay",
        in_a_row=2,
    ),
    Rule(
        needs=("AP", "student_AP"),
        holds=lambda now, first: now["AP"] < first["AP"] - AP_LOST,
        says="the teacher's AP {percent[AP]:.1f} is below its first {percent[first_AP]:.1f}: the stage does harm; "
        "lower --ssl.teacher.weight or --ssl.optim.lr, or leave the stage out",
        harms=True,
    ),
)


@dataclass(kw_only=True)
class Alarms:
    """The state of all rules of one stage. All ranks pass equal values, so all of them stop together.

    Attributes:
        good: where the last good weights are, for messages.
        num_steps: length of the stage.
        stops: whether rules that stop the stage do so, or only warn.
        fixed_teacher: the pseudo-labels are those of a network that does not change.
        first: the first value of each name, of this run or of the one that it resumes.
    """

    good: str
    num_steps: int
    stops: bool = True
    fixed_teacher: bool = False
    first: dict[str, float] = field(default_factory=dict)
    held: dict[Rule, tuple[int, int]] = field(default_factory=dict, init=False)  # since which step, how many times
    said: set[Rule] = field(default_factory=set, init=False)

    @property
    def unhealthy(self) -> bool:
        """Whether the condition of a rule that stops the stage is met."""
        return self.stops and any(rule.stops for rule in self.held)

    @property
    def healthy(self) -> bool:
        """Whether the current weights may replace those that were exported earlier."""
        return not (self.unhealthy or any(rule.harms for rule in self.held))

    def check(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Warnings about these values; each is given once until its condition no longer holds.

        Raises:
            Stopped: with what to change, and where the last good weights are.
        """
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        if "teacher_peak" in values and not values.get("skipped"):  # skipped steps have a warning of their own
            known["not_finite"] = float(not {"loss", "teacher_peak"} <= known.keys())
        self.first = known | self.first
        if "loss" in values and "teacher_peak" not in values:  # a step of labeled people alone: no more of them come
            self.held = {rule: held for rule, held in self.held.items() if not OF_UNLABELED & set(rule.needs)}
        said = []
        for rule in RULES:
            if not known.keys() >= set(rule.needs) or (rule.of_mean_teacher and self.fixed_teacher):
                continue
            if not rule.holds(known, self.first):
                self.held.pop(rule, None)
                self.said.discard(rule)
                continue
            since, times = self.held.get(rule, (step, 0))
            self.held[rule] = since, times + 1
            lasts = times + 1 >= rule.in_a_row and step - since >= rule.share * self.num_steps
            scores = known | {"first_AP": self.first.get("AP", math.nan)}
            percent = {name: 100 * value for name, value in scores.items() if name.endswith("AP")}
            text = rule.says.format(first=self.first, steps=step - since, percent=percent, **known)
            if lasts and rule.stops and self.stops:
                raise Stopped(f"stage ssl stopped at step {step}: {text}; the last good weights are {self.good}")
            if (lasts or rule.stops) and rule not in self.said:
                self.said.add(rule)
                stops = rule.stops and self.stops
                said.append(f"{text} (the stage stops after {rule.in_a_row} logs of this)" if stops else text)
        return said


# ---- The end

NEARLY_OPEN = 0.95
ENOUGH_PEOPLE = 100  # with 30 validation people a choice by AP was little better than chance, with 300 always right


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage hands over, and what is known of it.

    Attributes:
        step: of the weights that are handed over.
        last: the stage's last step.
        aps: the AP of those weights, of what the stage began with and of the last evaluation, by step.
        began: the step of what it began with; None where that was not evaluated.
        gain: how much higher the OKS of the validation people is than with what it began with.
        keep: the mean share of unlabeled keypoints that were learned from, over the logged steps with unlabeled people;
            None without any.
        limit_open: the mean share of their gradient's limit that was open, over the same steps; None where it is
            always whole.
        precision, precision_absent_wrong: the share of such labels that are right on validation people; the second
            counts keypoints without a label as wrong. nan where nothing was kept.
    """

    step: int
    last: int
    aps: Mapping[int, float]
    began: int | None
    gain: PairedDifference | None
    keep: float | None
    limit_open: float | None
    precision: float
    precision_absent_wrong: float


def describe_result(result: StageResult) -> str:
    """The last line of a stage: which weights it hands over, what it gained, and how right its pseudo-labels were."""
    ap, last = 100 * result.aps[result.step], max(result.aps)
    if result.step == result.began:
        found = f"AP {ap:.1f} -> {100 * result.aps[last]:.1f} at step {last}"
        parts = [f"hands over the weights that it began with: no later ones are better ({found}), nothing was gained"]
    else:
        before = "" if result.began is None else f"{100 * result.aps[result.began]:.1f} -> "
        found = "nobody could be measured" if ap < 0 else f"AP {before}{ap:.1f}"
        parts = [f"hands over the weights of step {result.step} of {result.last}: {found}{_judge(result.gain)}"]
    if result.keep is not None:
        parts.append(_describe_labels(result))
    if result.limit_open is not None and result.limit_open < NEARLY_OPEN:
        parts.append(
            f"the limit of the gradient of unlabeled people was {100 * result.limit_open:.0f} % open, since the labels "
            "were not learned yet"
        )
    return "; ".join(parts)


def _judge(gain: PairedDifference | None) -> str:
    if gain is None or not math.isfinite(gain.mean):
        return ""
    people = f"by {gain.num} validation {'person' if gain.num == 1 else 'people'}"
    few = f", which are few: measure on {ENOUGH_PEOPLE} or more" if gain.num < ENOUGH_PEOPLE else ""
    measured = f"; mean OKS {gain.mean:+.4f}, standard error {gain.stderr:.4f}, {people}{few}"
    if not gain.is_known:
        return f"{measured}: within 2 standard errors, so it is not known whether the stage helped"
    return f"{measured}: {'better' if gain.mean > 0 else 'worse'} than what it began with"


def _describe_labels(result: StageResult) -> str:
    assert result.keep is not None
    whole = result.limit_open is None or result.limit_open >= NEARLY_OPEN
    learned = f"it {'learned from' if whole else 'kept'} {100 * result.keep:.1f} % of the unlabeled keypoints"
    precision, absent_wrong = result.precision, result.precision_absent_wrong
    if not math.isfinite(precision):
        return f"{learned}; none of the validation people's is kept, so it is not known how right they are"
    right, counted = f"{100 * precision:.1f}", f"{100 * absent_wrong:.1f}"
    differs = math.isfinite(absent_wrong) and counted != right
    other = f" ({counted} % if those on keypoints without a label count as wrong)" if differs else ""
    return (
        f"{learned}; of the pseudo-labels that it would keep on validation people {right} % are near the truth{other}"
    )
