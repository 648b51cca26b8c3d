"""What tests of the algorithms share."""

import pytest

import dno
import regularized


@pytest.fixture
def fitted(monkeypatch):
    """What each call of `fit_pairs` was given: its pairs, and log pi_t [X, Y] at that moment."""
    calls, fit_pairs = [], dno.fit_pairs

    def spy(policy, D, *rest):
        calls.append((D, policy.log_probs().detach().clone()))
        return fit_pairs(policy, D, *rest)

    monkeypatch.setattr(dno, "fit_pairs", spy)
    monkeypatch.setattr(regularized, "fit_pairs", spy)
    return calls
