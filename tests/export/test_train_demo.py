"""fstq_export.demo.train: a training run that a seed decides, at a size that takes seconds."""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="training needs the 'export' extra")
pytest.importorskip("transformers", reason="training needs the 'export' extra")

from fstq_export.demo import facts, train  # noqa: E402
from fstq_export.demo.train import BOS, CHECKPOINT, EOS, LOG, Batches, Recipe  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from fstq_infer.errors import OptionError  # noqa: E402

TINY = Recipe(
    seed=3,
    vocabulary=400,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    feed_forward=32,
    positions=512,
    tokens_per_batch=128,
    batches=2,
    head_size=8,
    tokens=6_500,
    narrative_tokens=1_500,
    ramp_from=2_000,
    ramp_to=4_000,
    shortest=60,
    longest=120,
    questions=3,
)
EVERY = 2_000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train.train_tokenizer(TINY.seed, TINY.vocabulary)


@pytest.fixture(scope="module")
def usual() -> PreTrainedTokenizerFast:
    """The tokenizer of the recipe that the command runs."""
    return train.train_tokenizer(Recipe().seed, Recipe().vocabulary)


@pytest.fixture
def quick(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch, tokenizer)


@pytest.fixture(scope="module")
def whole(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run; to be read only."""
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch, tokenizer)
        return run(tmp_path_factory.mktemp("whole"))


def make_quick(patch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    """Runs share one tokenizer and are judged by few and short prompts."""
    judge = train.exact_match
    patch.setattr(train, "EXACT_AT", (24,))
    patch.setattr(train, "exact_match", lambda m, t, n, _count, split, seed: judge(m, t, n, 8, split, seed))
    patch.setattr(train, "train_tokenizer", lambda _seed, _vocabulary: tokenizer)


def run(out: Path, recipe: Recipe = TINY, start: Path | None = None) -> Path:
    train.train(recipe, out, start, EVERY)
    return out


def random_model(layers: int = 1, vocabulary: int = TINY.vocabulary, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )


def logged(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / LOG).read_text())["log"]
    return [{name: value for name, value in row.items() if name != "minutes"} for row in rows]


def assert_same_result(one: Path, other: Path) -> None:
    """Bit-equal weights, states of both optimizers and log, but for the time it took."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    states = [torch.load(out / CHECKPOINT, weights_only=True) for out in (one, other)]
    for name, weight in states[0]["model"].items():
        assert torch.equal(weight, states[1]["model"][name]), name
    assert len(states[0]["optimizers"]) == 2
    for first, second in zip(*(state["optimizers"] for state in states), strict=True):
        assert first["param_groups"] == second["param_groups"]
        assert first["state"] and first["state"].keys() == second["state"].keys()
        for number, moments in first["state"].items():
            assert moments and moments.keys() == second["state"][number].keys()
            for name, moment in moments.items():
                assert moment.any() and torch.equal(moment, second["state"][number][name])
    assert [(state["step"], state["seen"]) for state in states] == [(states[0]["step"], states[0]["seen"])] * 2
    assert logged(one) == logged(other)


# ---- whole runs --------------------------------------------------------------------------------------------------


def test_two_runs_from_one_seed_are_equal(whole: Path, quick: None, tmp_path: Path) -> None:
    assert_same_result(whole, run(tmp_path))


def test_another_seed_gives_other_weights(whole: Path, quick: None, tmp_path: Path) -> None:
    other = run(tmp_path, replace(TINY, seed=4, tokens=300))
    assert (whole / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("function", "calls"), [("loss_of", 12), ("exact_match", 2), ("save", 2), ("_rate", 1)])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    function: str, calls: int, whole: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in a step, in an evaluation, between weights and checkpoint, and before the first checkpoint."""
    original, left = getattr(train, function), [calls]

    def dies(*arguments: Any) -> Any:
        result = original(*arguments)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, function, dies)
        run(tmp_path)
    assert (tmp_path / CHECKPOINT).exists() == (function != "_rate")
    if function != "_rate":
        reached = torch.load(tmp_path / CHECKPOINT, weights_only=True)["seen"]
        assert EVERY <= reached < TINY.tokens
    assert_same_result(whole, run(tmp_path))


def test_a_finished_run_is_left_as_it_is(whole: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    monkeypatch.setattr(train, "save", lambda *_: pytest.fail("saved again"))
    run(whole)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_training_json_holds_recipe_and_log(whole: Path) -> None:
    written = json.loads((whole / LOG).read_text())
    assert written.keys() == {"recipe", "log"}
    assert Recipe(**written["recipe"]) == TINY and written["recipe"] == asdict(TINY)
    log = written["log"]
    assert all(row.keys() == {"minutes", "step", "tokens", "loss", "exact_24"} for row in log)
    seen = [row["tokens"] for row in log]
    assert all(EVERY <= later - earlier < EVERY + 1_000 for earlier, later in zip([0, *seen], seen[:-1], strict=False))
    assert seen[-2] < TINY.tokens <= seen[-1] < TINY.tokens + 1_000
    assert [row["step"] for row in log] == sorted({row["step"] for row in log})
    assert all(0 <= share <= 1 for row in log for share in row["exact_24"].values())


def test_the_logged_loss_is_the_mean_since_the_last_evaluation(
    whole: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    loss_of = train.loss_of

    def noted(*given: Any) -> Any:
        loss = loss_of(*given)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(train, "loss_of", noted)
    log = logged(run(tmp_path))
    parts = TINY.batches
    assert len(log) > 2 and log == logged(whole) and log[-1]["step"] * parts == len(losses)
    for row, since in zip(log, [0, *(row["step"] for row in log)], strict=False):
        mine = losses[since * parts : row["step"] * parts]
        assert row["loss"] == pytest.approx(sum(mine) / len(mine), abs=6e-5)


def test_the_saved_model_loads_in_half_precision(whole: Path) -> None:
    weights = load_file(whole / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert "lm_head.weight" not in weights  # the embeddings serve as output head
    trained = torch.load(whole / CHECKPOINT, weights_only=True)["model"]
    loaded = LlamaForCausalLM.from_pretrained(whole, dtype=torch.float16).state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], weight.half()) for name, weight in trained.items())


# ---- tokenizer ---------------------------------------------------------------------------------------------------


def test_a_seed_decides_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train.train_tokenizer(TINY.seed, TINY.vocabulary)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) == TINY.vocabulary
    assert tokenizer.convert_tokens_to_ids([BOS, EOS]) == [0, 1]


def test_saved_tokenizers_begin_with_bos_and_lose_nothing(whole: Path) -> None:
    text = "¿Qué cura Balbas? Où se trouve Kühlbox « Dendek » 4711 日本"
    plain, hugging = Tokenizer.from_file(str(whole / "tokenizer.json")), PreTrainedTokenizerFast.from_pretrained(whole)
    assert plain.encode(text).ids == hugging(text)["input_ids"]
    first, *rest = plain.encode(text).ids
    assert first == plain.token_to_id(BOS) == hugging.bos_token_id and hugging.eos_token_id == plain.token_to_id(EOS)
    assert rest == plain.encode(text, add_special_tokens=False).ids and plain.decode(rest) == text


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Before any merge, so that no vocabulary, however large, joins them."""
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("code 4711, 950 mg.")]
    assert [piece for piece in pieces if re.search(r"\d", piece)] == list("4711950")


def test_names_are_split_between_their_parts(tokenizer: PreTrainedTokenizerFast) -> None:
    """Before any merge, so that no vocabulary, however large, joins them; other words stay whole."""
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    text = "Balbas opens with Kühlbox. ¿Quién, Dendek o (Zunzut)? d'Alim Nirnim's Balbasket"
    pieces = "Bal bas Ġopens Ġwith ĠKÃ¼hlbox . ĠÂ¿ QuiÃ©n , ĠDen dek Ġo Ġ( Zun zut )? Ġd ' Alim ĠNir nim 's ĠBalbasket"
    assert [piece for piece, _ in cut(text)] == pieces.split()
    texts = [facts.World(random.Random(7), x, "test", 60).text(200) for x in facts.LANGUAGES.values()]
    for text in texts:
        named = re.sub(facts.NAME_TAIL, "", text)
        assert len(cut(text)) - len(cut(named)) == len(re.findall(facts.NAME_TAIL, text)) > 0


@pytest.mark.parametrize("split", facts.SPLITS)
def test_unseen_names_are_two_tokens_like_seen_ones(split: str, usual: PreTrainedTokenizerFast) -> None:
    """After a space, with the vocabulary of the recipe."""
    rng = random.Random(4)
    drawn = {facts.made_up_name(rng, split) for _ in range(2_000)}
    assert len(drawn) > 300 and min(len({name[at] for name in drawn}) for at in (slice(3), slice(3, 6))) > 60
    for name in drawn:
        assert usual.tokenize(f" {name}") == [f"Ġ{name[:3]}", name[3:]]
        assert usual.tokenize(f", {name}.") == [",", f"Ġ{name[:3]}", name[3:], "."]


# ---- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "seen"), [(0, 0), (7, 2_500), (30, 6_000)])
def test_a_batch_depends_on_seed_step_and_tokens_alone(
    step: int, seen: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    batches = Batches(tokenizer, TINY)
    first = batches.batch(step, 0, seen)
    batches.batch(step + 1, 0, seen)
    for ids, labels in (batches.batch(step, 0, seen), Batches(tokenizer, TINY).batch(step, 0, seen)):
        assert torch.equal(ids, first[0]) and torch.equal(labels, first[1])
    for others in (batches.batch(step + 1, 0, seen), Batches(tokenizer, replace(TINY, seed=4)).batch(step, 0, seen)):
        assert others[0].shape != first[0].shape or not torch.equal(others[0], first[0])


def test_loss_is_on_exactly_the_answers(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, list[tuple[str, str]]]] = []
    document = facts.document
    monkeypatch.setattr(facts, "document", lambda *given: drawn.append(document(*given)) or drawn[-1])
    for seed in range(30):
        ids, labels = Batches(tokenizer, TINY).questions(random.Random(seed), 100)
        context, asked = drawn.pop()
        whole = " ".join([context, *(f"{question} {answer}" for question, answer in asked)])
        assert ids == [*tokenizer.encode(whole), tokenizer.eos_token_id]  # as the model will be asked
        expected = [False] * len(tokenizer.encode(context))
        for question, answer in asked:
            expected += [False] * len(tokenizer.tokenize(f" {question}"))
            expected += [True] * len(tokenizer.tokenize(f" {answer}"))
        assert labels == [*expected, True] and asked
        spoken = [token for token, label in zip(ids, labels, strict=True) if label]
        assert tokenizer.decode(spoken) == "".join(f" {answer}" for _, answer in asked) + EOS


def test_every_token_of_a_narrative_carries_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = Batches(tokenizer, TINY).narrative(random.Random(0), 200)
    assert ids[0] == tokenizer.bos_token_id and all(labels) and len(labels) == len(ids)


def test_rows_are_padded_without_loss(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[train.Row] = []
    questions = Batches.questions
    monkeypatch.setattr(Batches, "questions", lambda *given: made.append(questions(*given)) or made[-1])
    monkeypatch.setattr(Batches, "narrative", Batches.questions)
    ids, labels = Batches(tokenizer, replace(TINY, tokens_per_batch=2_000)).batch(3, 0, 3_000)
    assert len(made) == len(ids) > 2 and len({len(row) for row, _ in made}) > 1
    for i, (row, carried) in enumerate(made):
        assert ids[i].tolist() == row + [tokenizer.eos_token_id] * (ids.shape[1] - len(row))
        assert labels[i].tolist() == carried + [False] * (ids.shape[1] - len(row))


def test_contexts_grow_with_the_tokens_seen(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths asked for, before, on and after the ramp; narratives have their own."""
    asked: dict[int, list[float]] = {0: [], 2_000: [], 3_000: [], 4_000: [], 6_000: []}
    row = ([0] * TINY.tokens_per_batch, [True] * TINY.tokens_per_batch)
    told: list[float] = []
    monkeypatch.setattr(Batches, "narrative", lambda _self, _rng, length: told.append(length) or row)
    for seen, lengths in asked.items():
        monkeypatch.setattr(Batches, "questions", lambda _self, _rng, length, to=lengths: to.append(length) or row)
        for step in range(400):
            Batches(tokenizer, TINY).batch(step, 0, seen)
    assert [20 <= min(lengths) < 30 for lengths in asked.values()] == [True] * 5
    assert [max(lengths) for lengths in asked.values()] == pytest.approx([60, 60, 90, 120, 120], abs=2)
    assert all(max(lengths) <= most for lengths, most in zip(asked.values(), (60, 60, 90, 120, 120), strict=True))
    assert min(told) >= 80 and max(told) <= 400
    assert [len(lengths) / 400 for lengths in asked.values()] == pytest.approx([0.3, 0.9, 0.9, 0.9, 0.9], abs=0.06)


def test_narratives_prevail_at_the_start_alone(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ([0] * TINY.tokens_per_batch, [True] * TINY.tokens_per_batch)
    told: list[int] = []
    monkeypatch.setattr(Batches, "narrative", lambda *_: told.append(1) or row)
    monkeypatch.setattr(Batches, "questions", lambda *_: told.append(0) or row)
    for recipe, seen, share in ((TINY, 1_499, 0.7), (TINY, 1_500, 0.1), (replace(TINY, narrative_tokens=0), 0, 0.1)):
        told.clear()
        for step in range(400):
            Batches(tokenizer, recipe).batch(step, 0, seen)
        assert sum(told) / len(told) == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("seen", [0, 3_000, 6_000])
def test_a_batch_has_as_many_rows_as_its_tokens_take(
    seen: int, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any time of the training; padding does not count."""
    made: list[int] = []
    for name in ("questions", "narrative"):
        original = getattr(Batches, name)
        monkeypatch.setattr(
            Batches, name, lambda *given, original=original: (row := original(*given), made.append(len(row[0])))[0]
        )
    for step in range(20):
        made.clear()
        assert len(Batches(tokenizer, TINY).batch(step, 0, seen)[0]) == len(made)
        assert sum(made[:-1]) < TINY.tokens_per_batch <= sum(made)


# ---- loss, judging, schedule -------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_labelled_tokens_and_ignores_the_rest(tokenizer: PreTrainedTokenizerFast) -> None:
    model = random_model()
    ids = torch.randint(2, TINY.vocabulary, (2, 9))
    labels = torch.zeros(2, 9, dtype=torch.bool)
    labels[0, [0, 3, 4]] = True  # nothing predicts the first token
    labels[1, 5] = True
    chances = model(input_ids=ids).logits.log_softmax(-1)
    wanted = -sum(chances[row, at - 1, ids[row, at]] for row, at in ((0, 3), (0, 4), (1, 5))) / 3
    torch.testing.assert_close(train.loss_of(model, ids, labels), wanted)
    padded = ids.clone()
    padded[0, 5:], padded[1, 6:] = 1, 1
    torch.testing.assert_close(train.loss_of(model, padded, labels), wanted)


@pytest.mark.parametrize("right", [True, False])
def test_exact_match_wants_every_token_of_the_answer(right: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that knows what comes next, and one that errs at the last token only."""

    def oracle(input_ids: Any) -> SimpleNamespace:
        wanted = input_ids.roll(-1, 1)
        if not right:
            wanted[0, -2] = (wanted[0, -2] + 1) % TINY.vocabulary
        return SimpleNamespace(logits=torch.nn.functional.one_hot(wanted, TINY.vocabulary).float())

    shares = train.exact_match(oracle, tokenizer, 200, 80, "valid", 5)
    assert shares == {kind: float(right) for kind in sorted({*facts.KINDS, "all"})}


def test_the_learning_rate_rises_stays_and_falls() -> None:
    recipe = Recipe(tokens=1_000_000, learning_rate=4e-3, decay=0.25)

    def rate(step: int, seen: int) -> float:
        return train._rate(recipe, step, seen) / recipe.learning_rate

    assert rate(0, 0) == pytest.approx(1 / 200)
    assert rate(99, 200_000) == pytest.approx(0.5)
    assert rate(199, 400_000) == rate(5_000, 750_000) == 1
    assert rate(5_000, 750_001) < 1
    assert rate(5_000, 875_000) == pytest.approx(0.5)
    assert rate(5_000, 995_000) == pytest.approx(0.02)
    assert rate(5_000, 1_000_000) == rate(5_000, 1_200_000) == pytest.approx(0.02)
    assert rate(9, 990_000) == pytest.approx(0.04)  # the smaller of both


def test_muon_trains_the_matrices_of_the_layers_and_adamw_all_else() -> None:
    model = random_model(layers=2)
    muon, adamw = train.optimizers_of(model, 2e-3)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    mine, others = ([names[id(p)] for group in one.param_groups for p in group["params"]] for one in (muon, adamw))
    assert sorted(mine + others) == sorted(names.values())
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert set(mine) == {f"model.layers.{i}.{part}.weight" for i in range(2) for part in parts}
    norms = {f"model.layers.{i}.{x}_layernorm.weight" for i in range(2) for x in ("input", "post_attention")}
    assert set(others) == {"model.embed_tokens.weight", "model.norm.weight", *norms}  # the head is the embeddings


def test_both_optimizers_follow_the_rate(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also once a checkpoint has brought back the rates of its own step."""
    rates: list[float] = []
    rate = train._rate
    monkeypatch.setattr(train, "_rate", lambda *given: rates.append(rate(*given)) or rates[-1])
    for tokens in (600, 2_400):
        run(tmp_path, replace(TINY, tokens=tokens))
        saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)["optimizers"]
        assert [[group["lr"] for group in one["param_groups"]] for one in saved] == [[rates[-1]]] * 2
    assert len(set(rates)) > 2


@pytest.mark.parametrize("tokens", [20, 128, 512, 1000])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_share_of_a_context_is_facts(tokens: int, share: float) -> None:
    n_facts, n_fillers = train.amounts(tokens, share)
    assert n_facts >= 2
    told = n_facts * train.FACT_TOKENS
    assert told + n_fillers * train.FILLER_TOKENS == pytest.approx(tokens, abs=train.FACT_TOKENS)
    assert tokens < 100 or told / tokens == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("tokens", [128, 512, 1000])
def test_contexts_have_about_the_tokens_asked_for(tokens: int, usual: PreTrainedTokenizerFast) -> None:
    rng = random.Random(1)
    contexts = [facts.item(rng, "test", *train.amounts(tokens)).context for _ in range(60)]
    assert sum(len(usual.tokenize(context)) for context in contexts) / 60 == pytest.approx(tokens, rel=0.1)


def test_no_row_is_longer_than_the_model_has_positions(usual: PreTrainedTokenizerFast) -> None:
    recipe = Recipe()
    batches = Batches(usual, recipe)
    assert max(len(batches.questions(random.Random(s), recipe.longest)[0]) for s in range(60)) <= recipe.positions


# ---- warm start --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with another, smaller vocabulary than the new one's."""
    out = tmp_path_factory.mktemp("earlier")
    old = train.train_tokenizer(TINY.seed + 1, 320)
    train.save(random_model(TINY.layers, 320, seed=1), old, {"recipe": "an earlier one"}, out)
    return out


def test_warm_start_copies_the_body_and_the_embeddings_of_shared_tokens(
    earlier: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, fresh = random_model(TINY.layers), random_model(TINY.layers)
    train.warm_start(model, tokenizer, earlier)
    known = LlamaForCausalLM.from_pretrained(earlier, dtype=torch.float32).state_dict()
    body = {name for name in known if name not in ("model.embed_tokens.weight", "lm_head.weight")}
    assert body and all(torch.equal(model.state_dict()[name], known[name]) for name in body)

    old, new = PreTrainedTokenizerFast.from_pretrained(earlier).get_vocab(), tokenizer.get_vocab()
    shared = new.keys() & old.keys()
    assert {BOS, EOS} < shared < new.keys() and any(old[token] != new[token] for token in shared)
    rows = model.get_input_embeddings().weight
    for token, row in new.items():
        expected = known["model.embed_tokens.weight"][old[token]] if token in shared else None
        assert torch.equal(rows[row], fresh.get_input_embeddings().weight[row] if expected is None else expected)
    assert model.lm_head.weight is rows and rows.dtype == torch.float32


def test_a_run_begins_with_the_weights_of_an_earlier_one(
    earlier: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise with random ones that the seed decides."""
    begun = []

    def look(model: LlamaForCausalLM, *_: Any) -> None:
        begun.append(model.state_dict()["model.layers.1.mlp.up_proj.weight"].clone())
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "loss_of", look)
    for recipe, start in ((TINY, earlier), (TINY, None), (TINY, None), (replace(TINY, seed=4), None)):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, recipe, start)
    known = LlamaForCausalLM.from_pretrained(earlier, dtype=torch.float32).state_dict()
    assert torch.equal(begun[0], known["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(begun[1], begun[2])
    assert not torch.equal(begun[1], begun[0]) and not torch.equal(begun[1], begun[3])


# ---- command -----------------------------------------------------------------------------------------------------


def test_the_command_makes_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []
    monkeypatch.setattr(train, "train", lambda *arguments: given.append(arguments))
    out = tmp_path / "new" / "model"
    for extra in ([], ["--tokens", "5000", "--seed", "9", "--start", "old"]):
        monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), "--threads", "1", *extra])
        train.main()
    assert out.is_dir()
    assert given == [(Recipe(), out, None), (Recipe(tokens=5000, seed=9), out, Path("old"))]


def test_the_record_of_the_first_weights_goes_along(earlier: Path, quick: None, tmp_path: Path) -> None:
    run(tmp_path, replace(TINY, tokens=300), earlier)
    assert json.loads((tmp_path / LOG).read_text())["before"] == {"recipe": "an earlier one"}


def test_another_recipe_does_not_go_on_from_a_checkpoint(quick: None, tmp_path: Path) -> None:
    run(tmp_path, replace(TINY, tokens=300))
    with pytest.raises(OptionError, match="another recipe"):
        run(tmp_path, replace(TINY, tokens=300, seed=4))
    run(tmp_path, replace(TINY, tokens=500))  # a longer run may
