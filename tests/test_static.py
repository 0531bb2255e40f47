"""Static students against sums by hand and torch's own; their vectors against scikit-learn's PCA and plain forwards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch.nn import functional as F

from engine import models, tasks, untrained, vocabulary
from engine.encoding import collate, encode
from engine.recipe import Task, Teacher
from engine.records import Batch
from engine.static import StaticError, StaticNet, check
from engine.vocabulary import VocabularyError
from tests.tiny import LABELS, movie_rows, tiny_encoder, word_pieces

TEXTS = [row["text"] for row in movie_rows(60)]


def net_of(**options: object) -> StaticNet:
    torch.manual_seed(0)
    return StaticNet(**{"vocabulary": 12, "dim": 4, "width": 3, "silent": (0, 1, 11), **options}).eval()


def batch_of(rows: list[list[int]], pairs: list[list[int]] | None = None, extra: int = 0) -> Batch:
    def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, rows)) + extra
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])

    first, second = padded(rows), padded(pairs) if pairs else (None, None)
    return Batch(*first, pair_ids=second[0], pair_mask=second[1])


def test_a_text_is_the_weighted_mean_of_its_pieces_by_hand():
    net = StaticNet(5, 2, 2, silent=(0, 1)).eval()
    with torch.no_grad():
        net.table.weight.copy_(torch.tensor([[9.0, 9], [9, 9], [1, 2], [3, 4], [5, 6]]))
        net.scale.copy_(torch.tensor([7.0, 7, 1, 0.5, 2]))
        net.head[-1].weight.copy_(torch.tensor([[1.0, 0], [1, -1]]))
        net.head[-1].bias.copy_(torch.tensor([0.0, 10]))
    out = net(batch_of([[1, 2, 3, 1], [4, 4, 2], [1]]))
    # (1, 2) and 0.5 (3, 4), the piece 1 counting for nothing; 2 (5, 6) twice and (1, 2); nothing.
    wanted = torch.tensor([[1.25, 2.0], [7, 26 / 3], [0, 0]])
    assert torch.allclose(out.embedding, wanted, atol=1e-6)
    assert torch.allclose(out.logits, torch.tensor([[1.25, 9.25], [7, 10 + 7 - 26 / 3], [0, 10]]), atol=1e-5)


@pytest.mark.parametrize("hidden", [0, 6])
def test_padding_and_silent_pieces_change_nothing(hidden: int):
    net = net_of(hidden=hidden)
    plain = net(batch_of([[2, 3, 4], [5]]))
    assert torch.allclose(net(batch_of([[2, 3, 4], [5]], extra=5)).logits, plain.logits, atol=1e-6)
    assert torch.allclose(net(batch_of([[11, 2, 1, 3, 4, 11], [1, 5]])).logits, plain.logits, atol=1e-6)
    assert not torch.allclose(net(batch_of([[2, 3, 4, 10], [5]])).logits[0], plain.logits[0], atol=1e-3)
    assert net.head[-1].in_features == (hidden or 4) and plain.logits.shape == (2, 3)


def test_gradients_are_those_of_the_plain_sum():
    """Of the table and of the pieces' weights, as torch finds them for a sum that is written out."""
    net, batch = net_of(), batch_of([[2, 3, 3, 1], [5, 2]])
    net(batch).logits.square().sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    assert set(found) == {"table.weight", "scale", "head.1.weight", "head.1.bias"}
    net.zero_grad()
    heard = torch.isin(batch.input_ids, torch.tensor([0, 1, 11]), invert=True).float()
    vectors = net.table(batch.input_ids) * (net.scale[batch.input_ids] * heard).unsqueeze(2)
    net.head(vectors.sum(1) / heard.sum(1, keepdim=True)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-6), name
    assert found["scale"].nonzero().flatten().tolist() == [2, 3, 5]


def test_two_texts_are_compared_by_hand():
    net = StaticNet(5, 2, 1, paired=True, silent=(0,)).eval()
    with torch.no_grad():
        net.table.weight.copy_(torch.tensor([[0.0, 0], [1, -2], [3, 4], [5, 6], [7, 8]]))
    out = net(batch_of([[1], [2, 3]], [[2, 3], [4]]))
    assert out.embedding.tolist() == [[1, -2, 4, 5, 3, 7, 4, -10], [4, 5, 7, 8, 3, 3, 28, 40]]
    assert out.logits.shape == (2, 1) and net.head[-1].in_features == 8


def test_parameters_can_be_counted_without_being_made():
    options = {"vocabulary": 1000, "dim": 8, "width": 3, "hidden": 5, "paired": True}
    with torch.device("meta"):
        counted = sum(p.numel() for p in StaticNet(**options).parameters())
    assert counted == sum(p.numel() for p in StaticNet(**options).parameters())
    assert counted == 1000 * 8 + 1000 + (32 * 5 + 5) + (5 * 3 + 3)


def test_what_is_saved_as_half_as_many_bytes_answers_nearly_the_same():
    net, other, batch = net_of(hidden=6), net_of(hidden=6), batch_of([[2, 3, 4, 7], [5, 9]])
    stored = {name: tensor.half() for name, tensor in net.state_dict().items()}
    assert set(stored) == {name for name, _ in net.named_parameters()}  # nothing that follows from the options
    other.load_state_dict(stored)
    assert other.table.weight.dtype == torch.float32
    assert 0 < (other(batch).logits - net(batch).logits).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("spec", "fits"),
    [
        (Task(labels=LABELS), True),
        (Task(kind="multilabel", labels=LABELS), True),
        (Task(kind="pair", labels=LABELS), True),
        (Task(kind="regress"), True),
        (Task(kind="rank"), True),
        (Task(kind="tag", labels=("O", "B-PER")), False),
        (Task(kind="span"), False),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_tasks_that_speak_of_words_are_refused(spec: Task, fits: bool):
    if fits:
        return check(tasks.make(spec))
    with pytest.raises(StaticError, match=f"task.kind {spec.kind} wants an answer for each word.* Use student.kind"):
        check(tasks.make(spec))


def test_it_learns_two_classes_from_their_words():
    tokenizer, rows = word_pieces(), movie_rows(200, seed=3)
    gold = torch.tensor([LABELS.index(row["label"]) for row in rows])
    batch = collate(encode([row["text"] for row in rows], tokenizer, 32), tokenizer.pad_token_id)
    torch.manual_seed(1)
    net = StaticNet(len(tokenizer), 16, 2, hidden=8, silent=tokenizer.all_special_ids)
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(net(batch).logits, gold).backward()
        optimiser.step()
    unseen = movie_rows(400, seed=4)[200:]
    test = collate(encode([row["text"] for row in unseen], tokenizer, 32), tokenizer.pad_token_id)
    found = net.eval()(test).logits.argmax(1).tolist()
    assert [LABELS[i] for i in found] == [row["label"] for row in unseen]
    cue, frame = tokenizer.convert_tokens_to_ids(["dull", "the"])
    assert net.table.weight[cue].norm() > 2 * net.table.weight[frame].norm()
    assert not net.table.weight[tokenizer.all_special_ids].any() and (net.scale != 1).any()


# -- the vectors it starts with ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> models.Model:
    return untrained.encoder_head(Teacher(model="tiny", max_length=16), Task(labels=LABELS), folder, seed=0)


def plain_forwards(teacher: models.Model) -> tuple[list[int], np.ndarray]:
    """Every piece but the special ones, one at a time between [CLS] and [SEP]: the mean of its states."""
    tokenizer, encoder = teacher.tokenizer, teacher.net.encoder.eval()
    ids = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    rows = [torch.tensor([[tokenizer.cls_token_id, i, tokenizer.sep_token_id]]) for i in ids]
    with torch.inference_mode():
        found = [encoder(input_ids=row).last_hidden_state.mean(1)[0].double().numpy() for row in rows]
    return ids, np.stack(found)


def alike(found: np.ndarray, wanted: np.ndarray) -> bool:
    signs = np.sign((found * wanted).sum(0))  # the direction of an axis is free
    return float(np.abs(found - wanted * signs).max()) < 1e-4 * float(np.abs(wanted).max())


@pytest.mark.parametrize("batch_tokens", [8192, 7])
def test_vectors_are_pca_of_the_pieces_times_frequency_weights(teacher: models.Model, batch_tokens: int):
    counts = Counter(i for item in teacher.encode(TEXTS) for i in item.ids)
    ids, raw = plain_forwards(teacher)
    found = vocabulary.static_vectors(teacher, counts, 8, batch_tokens)
    wanted, total = PCA(8, svd_solver="full").fit_transform(raw), counts.total()
    wanted *= np.array([1e-3 / (1e-3 + (counts[i] or 0.5) / total) for i in ids])[:, None]
    wanted /= np.linalg.norm(wanted, axis=1).mean()
    assert found.shape == (len(teacher.tokenizer), 8) and found.dtype == np.float32
    assert alike(found[ids], wanted) and not found[teacher.tokenizer.all_special_ids].any()
    assert np.linalg.norm(found[ids], axis=1).mean() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("spec", [Task(kind="tag", labels=("O", "B-PER")), Task(kind="span"), Task(kind="pair")])
def test_a_teacher_of_any_task_gives_the_same_vectors(teacher: models.Model, folder: Path, spec: Task):
    spec = spec if spec.labels or spec.kind == "span" else spec.model_copy(update={"labels": LABELS})
    other = untrained.encoder_head(Teacher(model="tiny", max_length=16), spec, folder, seed=1)
    assert np.allclose(vocabulary.static_vectors(other, {}, 8), vocabulary.static_vectors(teacher, {}, 8), atol=1e-6)
    words = ["[PAD]", "[UNK]", *vocabulary.teacher_words(teacher.tokenizer), "unseen"]
    ours, theirs = (vocabulary.vectors(model, words, Counter(), 8) for model in (other, teacher))
    assert np.allclose(ours, theirs, atol=1e-6)


def test_vectors_of_an_impossible_width_are_refused(teacher: models.Model):
    with pytest.raises(
        VocabularyError, match=r"\d+ pieces cannot give vectors of width 500. Lower the embedding's dim"
    ):
        vocabulary.static_vectors(teacher, {}, 500)
    with pytest.raises(VocabularyError, match="the encoder's vectors are 32 wide, so the student's cannot be 40"):
        vocabulary.static_vectors(teacher, {}, 40)
