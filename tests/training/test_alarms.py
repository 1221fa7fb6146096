"""Alarms at their thresholds."""

import math

import pytest

from sapiens_accel.config.options import options
from sapiens_accel.errors import UserError
from sapiens_accel.training.ssl_monitor import RULES, Alarms, Stopped

LOGGED = {"teacher_peak": 0.5, "teacher_peak_p99": 1.0, "spread": 0.2, "spread_labelled": 0.2, "keep": 0.6,
          "ema_moved": 1.0, "lr": 1e-4, "grad_ratio": 1.0, "loss": 0.1}  # fmt: skip
JUDGED = {"AP": 0.5, "student_AP": 0.5, "pseudo_precision": 0.9, "pseudo_precision_stderr": 0.005}
STOPS = [
    ({"teacher_peak": 0.2499}, {"teacher_peak": 0.2501}, "--ssl.teacher.weight"),
    ({"teacher_peak_p99": 1.201}, {"teacher_peak_p99": 1.199}, "--ssl.teacher.weight"),
    ({"spread": 0.0599}, {"spread": 0.0601}, "--ssl.teacher.weight"),
    ({"loss": math.nan}, {"loss": 1e6}, "--ssl.optim.lr"),
]
WARNS = [
    ({"ema_moved": 0.0099}, {"ema_moved": 0.0101}, LOGGED, 3, "--ssl.teacher.ema_decay"),
    ({"grad_ratio": 10.01}, {"grad_ratio": 9.99}, LOGGED, 3, "--ssl.teacher.weight"),
    ({"pseudo_precision": 0.869}, {"pseudo_precision": 0.871}, JUDGED, 1, "--ssl.teacher.threshold"),
    ({"student_AP": 0.511}, {"student_AP": 0.509}, JUDGED, 2, "--ssl.teacher.ema_decay"),
    ({"AP": 0.494, "student_AP": 0.49}, {"AP": 0.496, "student_AP": 0.49}, JUDGED, 1, "--ssl.teacher.weight"),
]


def _alarms() -> Alarms:
    """Of a stage that has begun in good health."""
    alarms = Alarms(good="in runs/x/ssl/weights", num_steps=10_000)
    assert alarms.check(1, LOGGED) == alarms.check(1, JUDGED) == []
    return alarms


@pytest.mark.parametrize(("sick", "well", "knob"), STOPS)
def test_a_stop_comes_with_the_third_log_in_a_row(sick: dict, well: dict, knob: str) -> None:
    alarms = _alarms()
    for step in (20, 40):
        said = alarms.check(step, LOGGED | sick)
        assert len(said) == (step == 20) and not alarms.healthy, "it is announced once"
        assert alarms.check(step, JUDGED) == [], "an evaluation between the logs says nothing about it"
    assert alarms.check(60, LOGGED | well) == [] and alarms.healthy
    for step in (80, 100):
        assert len(alarms.check(step, LOGGED | sick)) == (step == 80)
    with pytest.raises(Stopped) as stopped:
        alarms.check(120, LOGGED | sick)
    assert isinstance(stopped.value, UserError)
    text = str(stopped.value)
    assert knob in text and "step 120" in text and "in runs/x/ssl/weights" in text and "\n" not in text


@pytest.mark.parametrize(("sick", "well", "knob"), STOPS)
def test_an_alarm_ends_with_the_steps_that_have_unlabeled_people(sick: dict, well: dict, knob: str) -> None:
    """One odd log before the steps of labeled people alone would keep their weights from being saved and exported."""
    alarms = _alarms()
    alarms.check(20, LOGGED | sick)
    assert alarms.check(30, JUDGED) == [] and not alarms.healthy
    assert alarms.check(40, {"loss": 0.1, "lr": 1e-4, "ema_moved": 1.0}) == [] and alarms.healthy
    assert alarms.check(60, JUDGED | {"AP": 0.49}) and not alarms.healthy, "the evaluations' rules still hold"
    assert alarms.check(80, {"loss": 0.1, "lr": 1e-4, "ema_moved": 0.0}) == [] and not alarms.healthy


@pytest.mark.parametrize(("sick", "well", "knob"), STOPS)
def test_no_stop_just_inside_or_of_what_is_not_known(sick: dict, well: dict, knob: str) -> None:
    alarms = _alarms()
    (name,) = sick
    for step in range(20, 200, 20):
        unknown = [] if name in ("loss", "teacher_peak") else [LOGGED | {name: math.nan}]
        unknown += [] if name == "loss" else [{n: v for n, v in LOGGED.items() if n != name}]
        for values in (LOGGED | well, *unknown):
            assert alarms.check(step, values) == [] and alarms.healthy


@pytest.mark.parametrize(("sick", "well", "others", "times", "knob"), WARNS)
def test_a_warning_is_said_once_until_it_clears(sick: dict, well: dict, others: dict, times: int, knob: str) -> None:
    alarms = _alarms()
    for start in (20, 1000):  # the second time, after it has cleared
        said = [alarms.check(start + 20 * i, others | sick) for i in range(times + 2)]
        assert [len(lines) for lines in said] == [0] * (times - 1) + [1, 0, 0]
        assert knob in said[times - 1][0] and "\n" not in said[times - 1][0]
        assert not alarms.unhealthy, "it does not stop the stage"
        assert alarms.healthy == ("AP" not in sick), "but what does harm is not kept"
        for i in range(5):
            assert alarms.check(start + 500 + 20 * i, others | well) == []


@pytest.mark.parametrize(("keep", "inside"), [(0.049, 0.051), (0.981, 0.979)])
@pytest.mark.parametrize(("num_steps", "expected", "well_every"), [(10_000, 520, 500), (1000, 80, 80), (100, 60, 60)])
def test_keeping_next_to_nothing_or_everything_is_warned_of_after_a_share_of_the_stage(
    keep: float, inside: float, num_steps: int, expected: int, well_every: int
) -> None:
    """A twentieth, and three logs: a stage of 100 steps that learned nothing ended without a word."""
    alarms = Alarms(good="", num_steps=num_steps)
    said = [alarms.check(step, LOGGED | {"keep": keep}) for step in range(20, 600, 20)]
    assert [20 * (i + 1) for i, lines in enumerate(said) if lines] == [expected]
    text = said[expected // 20 - 1][0]
    assert "--ssl.teacher.threshold" in text and f"for {expected - 20} steps" in text
    alarms = Alarms(good="", num_steps=num_steps)
    for step in range(20, 2000, 20):
        values = LOGGED | {"keep": inside if step % well_every == 0 else keep}
        assert alarms.check(step, values) == [], "never for so long on end"


def test_a_precision_of_few_people_may_fall_by_two_standard_errors() -> None:
    """Of 100 kept keypoints, 0.90 and then 0.82 are within chance; of 1,000 they are not."""
    for stderr, noise in ((0.03, 2 * math.hypot(0.03, 0.04)), (0.009, 0.03)):
        alarms = Alarms(good="", num_steps=100)
        then = 0.04 if stderr == 0.03 else 0.01
        first = {"pseudo_precision": 0.9, "pseudo_precision_stderr": stderr}
        assert alarms.check(1, first) == []
        well, sick = ({"pseudo_precision": 0.9 - noise + by, "pseudo_precision_stderr": then} for by in (1e-3, -1e-3))
        assert alarms.check(20, well) == [] and len(alarms.check(40, sick)) == 1


def test_weights_that_are_not_to_move_may_stand_still() -> None:
    alarms = _alarms()
    assert not any(alarms.check(step, LOGGED | {"ema_moved": 0.0, "lr": 0.0}) for step in range(20, 200, 20))


def test_a_network_that_never_knew_more_than_the_mean_pose_goes_on() -> None:
    alarms = Alarms(good="", num_steps=100)
    assert not any(alarms.check(step, LOGGED | {"spread": 0.01}) for step in range(20, 200, 20)) and alarms.healthy


@pytest.mark.parametrize("name", ["loss", "teacher_peak"])
def test_one_overflow_is_no_end(name: str) -> None:
    alarms = _alarms()
    for step in range(20, 400, 60):
        assert len(alarms.check(step, LOGGED | {name: math.inf})) == 1 and alarms.unhealthy
        assert alarms.check(step + 20, LOGGED | {"grad_norm": math.nan}) == [] and alarms.healthy


def test_a_fixed_teacher_is_not_blamed_for_what_it_began_with() -> None:
    """Its peaks are those of its own training: the stage was stopped for them."""
    alarms = Alarms(good="", num_steps=100, fixed_teacher=True)
    values = LOGGED | {"teacher_peak_p99": 1.5}
    assert not any(alarms.check(step, values) for step in range(20, 200, 20)) and alarms.healthy
    with pytest.raises(Stopped, match="not finite"):
        for step in (200, 220, 240):
            alarms.check(step, values | {"loss": math.nan})


def test_warnings_alone_never_stop() -> None:
    alarms = Alarms(good="", num_steps=100, stops=False)
    said = [alarms.check(step, LOGGED | {"teacher_peak_p99": 7.5}) for step in range(20, 400, 20)]
    assert [len(lines) for lines in said] == [1] + [0] * 18 and "logs of this" not in said[0][0]
    assert alarms.healthy and not alarms.unhealthy


def test_a_resumed_stage_is_held_against_where_it_began() -> None:
    alarms = Alarms(good="", num_steps=100, first={"AP": 0.6, "teacher_peak": 0.9})
    assert "first 60.0" in alarms.check(100, JUDGED)[0]
    assert len(alarms.check(100, LOGGED | {"teacher_peak": 0.44})) == 1


def test_alarms_name_options_that_exist() -> None:
    known = {f"--{key}" for key in options()}
    words = {w.strip("(),;") for rule in RULES for w in rule.says.split() if w.strip("(").startswith("--")}
    assert words and words <= known
    assert all(any(word in rule.says for word in words) for rule in RULES)
