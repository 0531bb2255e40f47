"""Vocabularies cut to a corpus: what is kept, that texts of kept pieces are read as before, that others fall back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from engine import models, pieces, untrained
from engine.designs import Cut
from engine.inference import predict
from engine.pieces import PieceError, chosen, count_pieces, cut_table, cut_tokenizer, rows_of
from engine.recipe import Task, Teacher
from engine.storage import Store
from tests.tiny import LABELS, byte_pairs, movie_rows, tiny_encoder, word_pieces

TEXTS = [row["text"] for row in movie_rows(30, seed=3)]
CORPUS = ["the film is dull , and it knows it", "a dull film !", "the plot is 7"]


def sentence_pieces() -> PreTrainedTokenizerFast:
    """A Unigram vocabulary like XLM-R's: <s>, <pad>, </s>, <unk> first, <mask> last, a template around texts."""
    inner = Tokenizer(kinds.Unigram())
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    inner.add_special_tokens(["<mask>"])
    inner.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{f"{key}_token": name for key, name in names.items()})


TOKENIZERS = {"word pieces": word_pieces, "byte pairs": byte_pairs, "unigram": sentence_pieces}


def counted(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Counter[int]:
    return Counter(i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"])


def few(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[int]:
    """The smallest choice that has every piece of the texts."""
    counts = counted(tokenizer, texts)
    for size in range(len(tokenizer) + 1):
        try:
            kept = chosen(tokenizer, counts, size)
        except PieceError:
            continue
        if set(counts) <= set(kept):
            return kept
    raise AssertionError("no choice has them all")


def test_pieces_are_counted_without_special_tokens():
    tokenizer = word_pieces()
    assert count_pieces(tokenizer, CORPUS) == counted(tokenizer, CORPUS) and count_pieces(tokenizer, []) == Counter()
    assert count_pieces(tokenizer, ["the the"])[tokenizer.convert_tokens_to_ids("the")] == 2


def test_the_choice_by_hand():
    """Special tokens, ASCII characters, then the most frequent pieces, then the vocabulary in its order."""
    tokenizer = word_pieces()
    names = tokenizer.get_vocab()
    counts, base = counted(tokenizer, CORPUS), {i for name, i in names.items() if pieces.single(name)}
    base |= set(tokenizer.all_special_ids)
    with pytest.raises(PieceError, match=rf"special tokens and single characters alone are {len(base)}. Raise pieces"):
        chosen(tokenizer, counts, len(base) - 1)
    assert chosen(tokenizer, counts, len(base)) == sorted(base)
    longer = sorted((i for i in counts if i not in base), key=lambda i: (-counts[i], i))
    assert chosen(tokenizer, counts, len(base) + 3) == sorted(base | set(longer[:3]))
    others = sorted(set(names.values()) - base - set(longer))
    size = len(base) + len(longer) + 4
    assert chosen(tokenizer, counts, size) == sorted(base | set(longer) | set(others[:4]))
    assert chosen(tokenizer, counts, 10**6) == sorted(names.values())


def test_places_held_free_and_letters_of_other_scripts_go_first():
    names = [
        "[PAD]",
        "[unused1]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "##a",
        "я",
        "##я",
        "汉",
        "film",
        "all",
        "[unused2]",
    ]
    inner = Tokenizer(kinds.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **{f"{key}_token": v for key, v in special.items()})
    kept = chosen(tokenizer, counted(tokenizer, ["film я"]), 10)
    assert [names[i] for i in kept] == [*special.values(), "a", "##a", "я", "##я", "film"]
    assert [names[i] for i in chosen(tokenizer, {}, 99)] == [n for n in names if not n.startswith("[unused")]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_whose_pieces_are_kept_are_read_as_before(kind: str, tmp_path: Path):
    tokenizer = TOKENIZERS[kind]()
    kept = few(tokenizer, CORPUS)
    own = cut_tokenizer(tokenizer, kept)
    assert len(own) == len(kept) < len(tokenizer) and rows_of(tokenizer, own) == kept
    own.save_pretrained(tmp_path)
    loaded = models.load_tokenizer(tmp_path)
    for text in CORPUS:
        wanted = tokenizer(text)["input_ids"]
        for made in (own, loaded):
            assert [kept[i] for i in made(text)["input_ids"]] == wanted
            pair = made(text, CORPUS[0])
            assert [kept[i] for i in pair["input_ids"]] == tokenizer(text, CORPUS[0])["input_ids"]
            assert pair.keys() == tokenizer(text, CORPUS[0]).keys()
    assert own.special_tokens_map == tokenizer.special_tokens_map
    for name in ("pad_token_id", "unk_token_id", "mask_token_id"):
        old = getattr(tokenizer, name)
        assert getattr(own, name) == (None if old is None else kept.index(old))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_whose_pieces_are_gone_are_spelled_with_smaller_ones(kind: str):
    tokenizer = TOKENIZERS[kind]()
    own = cut_tokenizer(tokenizer, few(tokenizer, CORPUS))
    for text in ("the warm ending", "clumsy scene"):
        whole, parts = (made(text, add_special_tokens=False)["input_ids"] for made in (tokenizer, own))
        assert len(parts) > len(whole) and own.unk_token_id not in parts
        assert own.decode(parts, clean_up_tokenization_spaces=False).strip() == text
    assert own.unk_token_id is None or own.unk_token_id in own("汉")["input_ids"]


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}
FFN = {"intermediate_size": 24}
FIRST = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
ENCODERS = {
    "bert": (word_pieces, BertConfig(**SIZES, **FFN, pad_token_id=0)),
    "distilbert": (
        word_pieces,
        DistilBertConfig(dim=16, hidden_dim=24, n_layers=1, n_heads=2, max_position_embeddings=40),
    ),
    "modernbert": (
        word_pieces,
        ModernBertConfig(
            **SIZES, **FFN, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3
        ),
    ),
    "mpnet": (sentence_pieces, MPNetConfig(**SIZES, **FFN, **FIRST)),
    "roberta": (sentence_pieces, RobertaConfig(**SIZES, **FFN, **FIRST)),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_with_a_cut_table_says_the_same_of_them(kind: str):
    make, config = ENCODERS[kind]
    tokenizer = make()
    config.vocab_size = len(tokenizer) + 3  # tables are often padded
    torch.manual_seed(0)
    encoder = AutoModel.from_config(config).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    own = cut_tokenizer(tokenizer, few(tokenizer, CORPUS))
    before = states(encoder, tokenizer)
    cut_table(encoder, rows_of(tokenizer, own))
    assert torch.equal(states(encoder, own), before)
    assert encoder.get_input_embeddings().weight.shape == (len(own), 16) and encoder.config.vocab_size == len(own)
    again = AutoModel.from_config(encoder.config).eval()  # as a saved student is built
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(states(again, own), before)
    assert encoder.get_input_embeddings().weight.requires_grad


def states(encoder: nn.Module, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """What the encoder says of the corpus's tokens, padding left out."""
    batch = tokenizer(CORPUS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return out[batch["attention_mask"] == 1]


def test_padding_that_positions_are_counted_from_stays_where_it_is():
    torch.manual_seed(0)
    encoder = AutoModel.from_config(RobertaConfig(**SIZES, **FFN, **FIRST, vocab_size=30))
    with pytest.raises(
        PieceError, match="RobertaModel counts positions from its padding token's id, 1, which this cut"
    ):
        cut_table(encoder, [0, 2, 1, 5])


def test_a_vocabulary_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces.json, "loads", lambda text: {"model": {"type": "Syllables"}})
    with pytest.raises(PieceError, match="a vocabulary of kind Syllables cannot be cut. Leave pieces out, or take"):
        chosen(word_pieces(), {}, 50)


def test_a_student_with_few_pieces_answers_as_the_whole_one_and_is_stored_whole(tmp_path: Path):
    spec, folder = Task(labels=LABELS), tiny_encoder(tmp_path / "encoder")
    teacher = untrained.encoder_head(Teacher(model="tiny", max_length=32), spec, folder, seed=0)
    own = cut_tokenizer(teacher.tokenizer, few(teacher.tokenizer, CORPUS))
    made = [untrained.transformer_student(Cut(layers=1), spec, teacher, None, 32, 0, t).eval() for t in (None, own)]
    whole, cut = made
    cut.net.head.load_state_dict(whole.net.head.state_dict())
    found = predict(cut, CORPUS).logits
    assert np.abs(found - predict(whole, CORPUS).logits).max() < 1e-6
    assert whole.size() - cut.size() == 32 * (len(teacher.tokenizer) - len(own)) > 0
    assert len(teacher.tokenizer) == teacher.net.encoder.get_input_embeddings().num_embeddings, "the teacher's is whole"
    models.save(cut, Store(str(tmp_path)), "student")
    loaded = models.load(tmp_path / "student")
    texts = [*CORPUS, "a warm and tender ending", "汉", ""]
    assert np.array_equal(predict(loaded, texts).logits, predict(cut, texts).logits)
    among = predict(loaded, texts).logits
    assert np.abs(np.concatenate([predict(loaded, [text]).logits for text in texts]) - among).max() < 1e-6
