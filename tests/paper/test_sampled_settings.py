"""The settings of the algorithms with samples: their defaults, their bounds, what is refused."""

from dataclasses import FrozenInstanceError, asdict, fields

import pytest

import dno
import solvers
from helpers.sampled import SMALL, start
from model import TabularPolicy
from oracle import rock_paper_scissors
from pairs import Groups, Pairs, SamplingSettings


def test_the_defaults_are_those_of_section_5_or_of_the_recorded_runs():
    """The defaults are those of section 5 and where it has none those of the recorded runs."""
    section_5 = {"samples": 5, "temperature": 0.7, "top_p": 0.95, "ngram": 3, "replay": 0.3}
    ours = {
        "judgments": "outcomes",
        "replay_iterations": 4,
        "prompts_per_step": 12,
        "learning_rate": 1e-3,
        "learning_rate_decay": 0.8,
        "max_grad_norm": 0.05,
        "use_recorded": True,
        "prompts_at_once": None,
        "trained_samples": None,
        "words": str.split,
        "seed": 0,
    }
    assert asdict(SamplingSettings()) == section_5 | ours


def test_what_holds_for_shares_and_counts_at_their_bounds_is_accepted():
    SamplingSettings(
        top_p=1.0, replay=1.0, learning_rate_decay=1.0, replay_iterations=0, trained_samples=2
    )
    SamplingSettings(replay=0.0, learning_rate_decay=0.0, trained_samples=None)


@pytest.mark.parametrize(
    "kind",
    [
        dno.Regression,
        dno.ExactIteration,
        Groups,
        SamplingSettings,
        Pairs,
        dno.Best,
        dno.SampledIteration,
        solvers.Solution,
    ],
)
def test_no_record_and_no_settings_can_be_changed_afterwards(kind):
    """The settings are default arguments, shared by all calls; records of one iteration are kept by
    the next."""
    with pytest.raises(FrozenInstanceError):
        setattr(object.__new__(kind), fields(kind)[0].name, 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"prompts_per_step": 0}, "prompts_per_step is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm is inf"),
        ({"replay_iterations": -1}, "replay_iterations is -1"),
        ({"trained_samples": 1}, "trained_samples is 1"),
        ({"samples": 2.5}, r"samples is 2\.5; expected a whole number of at least 1"),
        ({"prompts_per_step": 1.5}, r"prompts_per_step is 1\.5"),
        ({"prompts_at_once": 0}, "prompts_at_once is 0"),
        (
            {"trained_samples": 2.5},
            r"trained_samples is 2\.5; expected a whole number of at least 2",
        ),
        ({"ngram": -1}, "ngram is -1; expected a whole number of at least 0"),
        ({"learning_rate_decay": -0.1}, "learning_rate_decay is -0.1"),
        ({"replay": -0.1}, "replay is -0.1"),
        ({"replay": 1.1}, "replay is 1.1"),
        ({"learning_rate_decay": 2.0}, "learning_rate_decay is 2"),
    ],
)
def test_bad_settings_are_one_clear_error_that_names_the_value(bad, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**bad)


@pytest.mark.parametrize(
    ("names", "bad", "message"),
    [
        (["2", "3", "4-I"], {"eta": 0.0}, "eta is 0"),
        (["2", "3", "4-I"], {"eta": float("nan")}, "eta is nan"),
        (["2", "3", "4-I"], {"T": 0}, "iterations is 0"),
        (["3", "4-I"], {"tau": -0.1}, "tau is -0.1"),
        (
            ["2", "3", "4-I"],
            {"T": 2.5},
            r"iterations is 2\.5; expected a whole number of at least 1",
        ),
        (["2", "3", "4-I"], {"eta": 1e-320}, "eta is 1e-320; expected a finite number above 0"),
        (["3", "4-I"], {"tau": "x"}, "tau is 'x'"),
        (["3", "4-I"], {"every": 1.5}, r"move_reference_every is 1\.5"),
        (
            ["2", "3", "4-I"],
            {"oracle": rock_paper_scissors().P},
            "oracle is of type Tensor; expected",
        ),
        (["2", "3", "4-I"], {"oracle": None}, r"pass oracle\.PreferenceTable\(P\)"),
        (["3", "4-I"], {"tau": 1.5}, "tau is 1.5 and eta 1"),
        (["4-III"], {}, "option is 'III'"),
    ],
)
def test_a_bad_argument_is_one_clear_error_that_names_the_value(names, bad, message):
    for name in names:
        with pytest.raises(ValueError, match=message):
            next(
                start(
                    name,
                    TabularPolicy(1, 3),
                    prompts=[0],
                    gold=[1],
                    settings=SMALL,
                    **{"oracle": rock_paper_scissors(), **bad},
                )
            )
