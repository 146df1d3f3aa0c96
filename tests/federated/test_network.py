"""The virtual clock: a round worked out by hand, draws that do not depend on order, energy, deadlines, bad settings."""

from __future__ import annotations

import numpy as np
import pytest

from fstq_infer.errors import OptionError
from fstq_infer.federated.network import LINKS, MEGABIT, Compute, Link, Network, Work, links


def test_a_round_by_hand() -> None:
    fast, slow = Link(1000, 2000, 0.5), Link(100, 200, 0.1)
    network = Network([fast, slow], Compute(0.25, watts=5))
    done = network.round(1, {1: Work(400, 50, 2), 0: Work(400, 3000, 4)})
    assert done.arrived == (0, 1) and done.uplink == 3050 and done.downlink == 800
    first, second = 1.0 + 0.2 + 1.0 + 3.0, 0.2 + 2.0 + 0.5 + 0.5
    assert done.seconds == pytest.approx(max(first, second))
    assert done.joules == pytest.approx(2 * (0.2 + 3.0 + 2.0 + 0.5) + 5 * 1.5)
    network.round(2, {1: Work(400, 50, 2)})
    assert network.clock == pytest.approx(first + second) and network.joules > done.joules


def test_the_deadline_ends_a_round() -> None:
    network = Network([Link(1000, 1000, 0.0), Link(10, 1000, 0.0)], deadline=2.0)
    done = network.round(1, {0: Work(0, 1000), 1: Work(0, 1000)})
    assert done.arrived == (0,) and done.late == (1,) and done.seconds == 2.0
    assert network.round(2, {0: Work(0, 1000)}).seconds == 1.0


def test_stragglers_are_slower_in_their_rounds_only() -> None:
    network = Network([Link(1000, 1000, 0.0, slow=0.3, factor=10)])
    seconds = [network.seconds(number, 0, Work(0, 1000)) for number in range(400)]
    assert set(np.round(seconds, 6)) == {1.0, 10.0} and 0.2 < np.mean(np.array(seconds) > 5) < 0.4


@pytest.mark.parametrize("name", ["dropout", "loss"])
def test_shares_of_lost_replies(name: str) -> None:
    network = Network(links("lte", 50), seed=3, **{name: 0.3})
    rounds = [network.round(number, dict.fromkeys(range(50), Work(1000, 1000, 1))) for number in range(20)]
    lost = sum(len(done.lost) for done in rounds)
    assert 0.25 < lost / 1000 < 0.35 and sum(len(done.arrived) for done in rounds) == 1000 - lost
    sent = sum(done.uplink for done in rounds)
    assert sent == (1000 * (1000 - lost) if name == "dropout" else 1000 * 1000)


def test_draws_depend_on_seed_round_and_client_only() -> None:
    one, two = (Network(links("lte", 20, 1), Compute(0.1, 0.5), 0.2, 0.2, seed=7) for _ in range(2))
    work = dict.fromkeys(range(20), Work(5000, 500, 3))
    ahead = two.round(5, work)
    for number in range(1, 5):
        one.round(number, dict.fromkeys(range(number), Work(1, 1)))
    assert one.round(5, work) == ahead
    assert Network(links("lte", 20, 1), dropout=0.2, seed=8).round(5, work).arrived != ahead.arrived


@pytest.mark.parametrize("name", LINKS)
def test_links_are_in_their_range(name: str) -> None:
    found = links(name, 300, 0)
    speeds = np.array([link.uplink for link in found]) / MEGABIT
    assert len(found) == 300 and speeds.min() >= 0.5 and speeds.max() <= 20
    assert found == links(name, 300, 0)
    if name == "lte":
        assert 4 < np.median(speeds) < 6 and speeds.std() > 2 and found != links(name, 300, 1)


def test_nobody_asked_takes_no_time() -> None:
    done = Network(links("fixed", 2)).round(1, {})
    assert done.seconds == 0 and done.joules == 0 and done.arrived == ()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Link(0, 1),
        lambda: Link(1, float("inf")),
        lambda: Link(1, 1, -1),
        lambda: Link(1, 1, slow=2),
        lambda: Compute(-1),
        lambda: Network([]),
        lambda: Network(links("fixed", 1), dropout=1),
        lambda: Network(links("fixed", 1), deadline=0),
        lambda: links("5g", 3),
    ],
)
def test_impossible_settings(make: object) -> None:
    with pytest.raises(OptionError):
        make()  # type: ignore[operator]
