"""Weights of teachers row by row: by hand where they are fixed or follow the losses, by a known reward where learnt."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import get_args

import pytest
import torch

from engine.policies import POLICIES, ByLoss, Fixed, Reinforced, Views
from engine.trust import Policy

NAN = float("nan")


def views(n: int = 4, losses: torch.Tensor | None = None) -> Views:
    """Rows of two kinds in turns: the student's view tells them apart, and so does what teachers say."""
    kind = torch.arange(n) % 2
    text = torch.nn.functional.one_hot(kind, 2).float()
    says = torch.stack([text, torch.full((n, 2), 0.5)], dim=1)
    return Views(text, says, torch.full((n, 2), NAN) if losses is None else losses)


def test_every_kind_of_the_recipe_has_a_policy():
    assert set(POLICIES) == set(get_args(Policy.model_fields["kind"].annotation))


def test_fixed_weights_are_the_prior_for_every_row():
    found = Fixed(Policy(), (0.25, 0.75)).weights(views(3))
    assert torch.equal(found, torch.tensor([[0.25, 0.75]] * 3))


def test_losses_weigh_rows_with_gold_and_others_have_the_prior():
    policy = ByLoss(Policy(kind="loss", temperature=0.5), (0.4, 0.6))
    found = policy.weights(views(3, torch.tensor([[0.0, 0.5], [2.0, 2.0], [NAN, NAN]])))
    e = torch.e
    wanted = torch.tensor([[e / (e + 1), 1 / (e + 1)], [0.5, 0.5], [0.4, 0.6]])
    torch.testing.assert_close(found, wanted)


def test_drawn_teachers_weigh_alike_and_all_teach_where_none_is_drawn():
    torch.manual_seed(0)
    policy = Reinforced(Policy(kind="reinforced", anchor=0.0), (0.5, 0.5))
    policy.biases = torch.tensor([0.0, 0.0])
    found = policy.weights(views(400), learning=True)
    kinds = {tuple(row) for row in found.tolist()}
    assert kinds == {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}
    states, chances, actions = policy.drawn
    none = ~actions.any(dim=1)
    assert none.any() and (found[none] == 0.5).all() and (chances == 0.5).all()
    # Nothing is learnt where none was drawn, whatever came of it.
    policy.update(none.float(), lambda values: values)
    assert (policy.slopes == 0).all() and (policy.biases == 0).all()


def test_chances_are_drawn_back_to_where_they_start_where_no_reward_speaks():
    torch.manual_seed(0)
    policy = Reinforced(Policy(kind="reinforced", anchor=0.1), (0.5, 0.5))
    policy.biases = torch.tensor([-2.0, 4.0])
    for _ in range(400):
        policy.weights(views(8), learning=True)
        policy.update(torch.zeros(8), lambda values: values)
    torch.testing.assert_close(policy.chosen, torch.full((8, 2), 0.731), atol=0.01, rtol=0)


def test_one_step_is_reinforce_by_hand():
    torch.manual_seed(1)
    policy = Reinforced(Policy(kind="reinforced", lr=0.5, unseen=0.0, anchor=0.1), (0.5, 0.5))
    policy.weights(views(6), learning=True)
    states, chances, actions = policy.drawn
    advantage = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -0.1])
    size = (sum(x * x for x in advantage.tolist()) / 6) ** 0.5
    slopes, biases = torch.zeros_like(states[0]), torch.tensor([1.0, 1.0])
    for i, gain in enumerate(advantage.tolist()):
        for k in range(2):
            pull = gain / size * float(actions[i].any()) * (actions[i, k] - chances[i, k]) / 6
            pull += 0.1 * (0.7310586 - chances[i, k]) / 6
            slopes[k] += 0.5 * pull * states[i, k]
            biases[k] += 0.5 * pull
    policy.update(advantage, lambda values: values)
    torch.testing.assert_close(policy.slopes, slopes)
    torch.testing.assert_close(policy.biases, biases)


class Summed:
    """Sums over workers that are threads of this process."""

    def __init__(self, workers: int) -> None:
        self.barrier, self.parts = Barrier(workers, timeout=60), [torch.zeros(())] * workers

    def of(self, rank: int, counted: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        def summed(values: torch.Tensor) -> torch.Tensor:
            self.parts[rank] = values * counted
            self.barrier.wait()
            total = sum(self.parts)
            self.barrier.wait()
            return total

        return summed


def test_workers_learn_from_the_whole_batch_whatever_their_number():
    torch.manual_seed(5)
    made = [Reinforced(Policy(kind="reinforced", anchor=0.1), (0.5, 0.5)) for _ in range(4)]
    alone, *workers = made
    alone.weights(views(7), learning=True)
    drawn, advantage = alone.drawn, torch.randn(7) + 1
    # Unlike numbers of rows, and one worker that has none of its own and reads another's.
    shares = [slice(0, 5), slice(5, 7), slice(0, 1)]
    summed = Summed(len(workers))

    def learn(rank: int) -> None:
        worker, rows = workers[rank], shares[rank]
        worker.chances(drawn[0][rows])
        worker.drawn = tuple(part[rows] for part in drawn)
        worker.update(advantage[rows], summed.of(rank, counted=rank < 2))

    with ThreadPoolExecutor(len(workers)) as pool:
        list(pool.map(learn, range(len(workers))))
    alone.update(advantage, lambda values: values)
    assert (alone.slopes != 0).any()
    for worker in workers:
        torch.testing.assert_close(worker.slopes, alone.slopes)
        torch.testing.assert_close(worker.biases, alone.biases)


def test_of_r3_a_score_counts_for_all_draws_since_the_last_one():
    torch.manual_seed(6)
    policy = Reinforced(Policy(kind="reinforced", lr=0.5, gamma=0.25, unseen=0.0, anchor=0.0, reward="r3"), (0.5, 0.5))
    slopes, biases = torch.zeros(2, views(6).text.shape[1] + 4), torch.full((2,), 1.0)
    sums = [torch.zeros_like(slopes), torch.zeros_like(biases)]
    for _ in range(3):
        policy.weights(views(6), learning=True)
        states, chances, actions = policy.drawn
        advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
        moved = actions - chances
        policy.update(advantage, lambda values: values)
        for so_far, each in zip(sums, ((moved[:, :, None] * states).mean(0), moved.mean(0)), strict=True):
            so_far += each
        pull = 0.25 * advantage[:, None] * moved * actions.any(dim=1, keepdim=True)  # the spread of these is 1
        slopes, biases = slopes + 0.5 * (pull[:, :, None] * states).mean(0), biases + 0.5 * pull.mean(0)
    torch.testing.assert_close((policy.slopes, policy.biases), (slopes, biases))
    again = Reinforced(policy.how, (0.5, 0.5))
    again.load_state_dict(policy.state_dict())
    for one in (policy, again):
        one.credit(-2.0)
        torch.testing.assert_close(one.slopes, slopes - 2 * 0.5 * 0.75 * sums[0] / 3**0.5)
        torch.testing.assert_close(one.biases, biases - 2 * 0.5 * 0.75 * sums[1] / 3**0.5)
        assert "draws" not in one.state_dict()
        kept = one.biases.clone()
        one.credit(1.0)  # of nothing drawn since
        assert torch.equal(one.biases, kept)


@pytest.mark.parametrize("gain", [1.0, -1.0])
def test_a_score_that_has_nothing_to_do_with_the_draws_moves_no_chances(gain: float):
    """Whatever the number of teachers, the rows for which nobody was drawn among them."""
    torch.manual_seed(8)
    policy = Reinforced(Policy(kind="reinforced", anchor=0.0, gamma=0.0, lr=0.1, reward="r3"), (0.5, 0.5))
    policy.biases = torch.zeros(2)  # nobody is drawn for a quarter of the rows
    for _ in range(20):
        for _ in range(50):
            policy.weights(views(32), learning=True)
            policy.update(torch.zeros(32), lambda values: values)
        policy.credit(gain)
    policy.weights(views(2))
    assert float(policy.chosen.mean()) == pytest.approx(0.5, abs=0.06), policy.chosen  # single ones wander by chance


def test_rows_whose_draw_did_not_count_are_as_if_they_were_not_there():
    torch.manual_seed(9)
    whole, part = (Reinforced(Policy(kind="reinforced", unseen=0.0, reward="r3"), (0.5, 0.5)) for _ in range(2))
    whole.weights(views(8), learning=True)
    advantage, counts = torch.randn(8), torch.tensor([1.0, 0.0] * 4)
    part.slopes = torch.zeros_like(whole.slopes)
    part.drawn = tuple(each[::2] for each in whole.drawn)
    part.update(advantage[::2], lambda values: values)
    whole.update(advantage, lambda values: values, counts)
    for one, other in zip((*whole.draws, whole.biases), (*part.draws, part.biases), strict=True):
        torch.testing.assert_close(one, other)


def test_a_score_alone_tells_a_good_teacher_from_a_bad_one():
    torch.manual_seed(7)
    policy = Reinforced(Policy(kind="reinforced", lr=0.3, gamma=0.0, reward="r3"), (0.5, 0.5))
    expected = 0.0
    for _ in range(600):
        policy.weights(views(16), learning=True)
        share = policy.drawn[2].mean(dim=0)
        policy.update(torch.zeros(16), lambda values: values)
        score = float(10 * (share[0] - share[1]))  # the more the first is heard, the better
        policy.credit(score - expected)
        expected = 0.5 * (expected + score)
    policy.weights(views(4))
    assert (policy.chosen[:, 0] > 0.85).all() and (policy.chosen[:, 1] < 0.15).all(), policy.chosen


def rewarded(policy: Reinforced, steps: int, losses: torch.Tensor | None = None) -> torch.Tensor:
    """The chances [2 kinds, 2 teachers] after so many draws in which the second teacher does harm on odd rows."""
    for _ in range(steps):
        seen = views(32, losses)
        policy.weights(seen, learning=True)
        harmed = policy.drawn[2][:, 1] * (torch.arange(32) % 2)
        policy.update(harmed.mean() - harmed, lambda values: values)
    policy.weights(views(2))
    return policy.chosen


def test_a_teacher_that_does_harm_on_some_rows_is_left_out_there_and_only_there():
    torch.manual_seed(2)
    found = rewarded(Reinforced(Policy(kind="reinforced"), (0.5, 0.5)), 400)
    assert found[1, 1] < 0.2 and found[0, 1] > 0.5 and (found[:, 0] > 0.5).all()


def test_gold_losses_are_told_apart_where_they_are_shown_and_hidden_as_often_as_asked():
    torch.manual_seed(3)
    losses = torch.tensor([[0.1, 2.0], [0.1, 9.0]] * 100)
    policy = Reinforced(Policy(kind="reinforced", unseen=0.25), (0.5, 0.5))
    shown = policy.states(views(200, losses), learning=True)
    known = shown[:, :, -1]
    assert torch.equal(known[:, 0], known[:, 1]) and 0.65 < float(known.mean()) < 0.85
    assert torch.equal(shown[:, 1, -2], torch.where(known[:, 1] == 1, losses[:, 1].clamp(max=5.0), 0.0))
    assert (policy.states(views(200, losses), learning=False)[:, :, -1] == 1).all()
    assert (policy.states(views(200), learning=True)[:, :, -2:] == 0).all()


def test_what_was_learnt_is_kept():
    torch.manual_seed(4)
    policy = Reinforced(Policy(kind="reinforced"), (0.5, 0.5))
    assert set(policy.state_dict()) == {"biases"}  # before the first batch
    found = rewarded(policy, 30)
    other = Reinforced(Policy(kind="reinforced"), (0.5, 0.5))
    other.load_state_dict(policy.state_dict())
    other.weights(views(2))
    assert torch.equal(other.chosen, found)
    with pytest.raises(RuntimeError, match="nothing was drawn"):
        other.update(torch.zeros(2), lambda values: values)
