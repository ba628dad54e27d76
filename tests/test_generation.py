from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HOOK, JOY, JOY_TOKEN, WORDS, make_sae
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sae_emotion_plugin.generation import continuations as generation
from sae_emotion_plugin.generation.continuations import (
    Continuation,
    Request,
    complete,
    expected_next_token,
    generate,
    judge_rows,
)
from sae_emotion_plugin.generation.decoding import prompt_tokens, stepping
from sae_emotion_plugin.generation.likelihoods import continuation_nll
from sae_emotion_plugin.generation.records import Generations
from sae_emotion_plugin.generation.sampling import Sampling, choose
from sae_emotion_plugin.interventions.hooks import steering
from sae_emotion_plugin.interventions.plans import Intervention, SteeringPlan
from sae_emotion_plugin.judges.judge import valence
from sae_emotion_plugin.text_costs import is_degenerate

BOS, NEW = 1, 6
NORM = 5.0


def plan_of(sae: Any, *amounts: float, mode: Any = "add") -> SteeringPlan:
    return SteeringPlan.of({JOY + i: amount for i, amount in enumerate(amounts)}, sae, residual_norm=NORM, mode=mode)


def mixed_requests(sae: Any) -> list[Request]:
    """Different lengths, plans, temperatures and seeds."""
    both = SteeringPlan(HOOK, (Intervention(JOY, 0.6), Intervention(3, 0.4, "clamp")), residual_norm=NORM)
    return [
        Request("he is such a"),
        Request("he is such a", plan_of(sae, 0.8)),
        Request("w3", plan_of(sae, 0.5, -0.5), temperature=1.5, seed=3),
        Request("w3 w4 w5 w6 w7 w8 w9", plan_of(sae, 1.0, mode="clamp")),
        Request("w3 w4 w5 w6 w7 w8 w9", both, temperature=1.0, seed=4),
        Request("w3", temperature=1.5, seed=3),
    ]


def by_hand(model: Any, sae: Any, request: Request, n: int = NEW) -> list[int]:
    """One request at a time, the whole text anew for every token, the distribution summed up in double precision."""
    tokens = [BOS, *model.tokenizer(request.prompt, add_special_tokens=False)["input_ids"]]
    generator = torch.Generator().manual_seed(request.seed)
    written: list[int] = []
    for _ in range(n):
        rows = torch.tensor([[*tokens, *written]])
        with torch.no_grad():
            if request.plan is None:
                logits = model(rows)[0, -1]
            else:
                with steering(model, sae, request.plan):
                    logits = model(rows)[0, -1]
        if request.temperature == 0:
            written.append(int(logits.argmax()))
            continue
        weights = np.exp(logits.double().numpy() / request.temperature)
        draw = float(torch.rand(1, generator=generator, dtype=torch.float64))
        written.append(int(np.searchsorted(np.cumsum(weights) / weights.sum(), draw, side="right")))
    return written


def run(model: Any, sae: Any, requests: Sequence[Request], **kwargs: Any) -> tuple[Continuation, ...]:
    return complete(model, sae, requests, **{"max_new_tokens": NEW, "progress": False, **kwargs})


def ending_at(monkeypatch: pytest.MonkeyPatch, tokens: set[int]) -> None:
    monkeypatch.setattr(generation, "end_tokens", lambda model: tokens)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_mixed_batch_writes_what_each_request_gets_alone_by_hand(
    model: Any, planted_sae: Any, use_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending_at(monkeypatch, set())
    requests = mixed_requests(planted_sae)
    done = run(model, planted_sae, requests, use_cache=use_cache)
    assert [one.request for one in done] == requests
    assert [list(one.token_ids) for one in done] == [by_hand(model, planted_sae, one) for one in requests]
    # The check would be empty if all rows said the same.
    assert len({one.token_ids for one in done}) >= 4


@pytest.mark.parametrize("name", ["bridge", "learned_positions"])
def test_the_cache_changes_no_logits(name: str, layer_norm_sae: Any, request: pytest.FixtureRequest) -> None:
    model, requests = request.getfixturevalue(name), mixed_requests(layer_norm_sae)
    prompts = [prompt_tokens(model, layer_norm_sae, one.prompt, NEW) for one in requests]
    written = torch.randint(4, len(WORDS), (len(requests), NEW), generator=torch.Generator().manual_seed(0))
    seen: list[list[torch.Tensor]] = []
    for use_cache in (True, False):
        with (
            torch.inference_mode(),
            stepping(model, layer_norm_sae, [one.plan for one in requests], prompts, use_cache) as forward,
        ):
            seen.append([forward(written[:, :step]) for step in range(NEW + 1)])
    for cached, recomputed in zip(*seen, strict=True):
        torch.testing.assert_close(cached, recomputed, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_rows", [1, 2, 5])
def test_the_batch_a_row_is_in_does_not_change_its_text(bridge: Any, planted_sae: Any, batch_rows: int) -> None:
    requests = mixed_requests(planted_sae)
    together, apart = (run(bridge, planted_sae, requests, batch_rows=rows) for rows in (64, batch_rows))
    assert [one.token_ids for one in together] == [one.token_ids for one in apart]
    assert [one.nll for one in together] == pytest.approx([one.nll for one in apart], abs=1e-5)


def test_a_longer_text_begins_with_the_shorter_one(bridge: Any, planted_sae: Any) -> None:
    requests = mixed_requests(planted_sae)
    short, long = (run(bridge, planted_sae, requests, max_new_tokens=n) for n in (3, 20))
    assert all(b.token_ids[: len(a.token_ids)] == a.token_ids for a, b in zip(short, long, strict=True))


def test_seeds_give_different_texts_and_leave_the_global_generator_alone(bridge: Any, planted_sae: Any) -> None:
    requests = [Request("he is", temperature=1.5, seed=seed) for seed in range(8)]
    state = torch.random.get_rng_state()
    first, second = (run(bridge, planted_sae, requests) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == second
    assert len({one.text for one in first}) > 4


def test_a_continuation_ends_before_the_first_end_token(
    bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request("he is such a", temperature=2.0, seed=seed) for seed in range(6)]
    ending_at(monkeypatch, set())
    whole = run(bridge, planted_sae, requests)
    end = whole[0].token_ids[3]
    ending_at(monkeypatch, {end})
    ended = run(bridge, planted_sae, requests)
    for full, cut in zip(whole, ended, strict=True):
        stop = full.token_ids.index(end) if end in full.token_ids else NEW
        assert cut.token_ids == full.token_ids[:stop]
        assert WORDS[end] not in cut.text.split()
    assert len(ended[0].token_ids) < NEW == len(whole[0].token_ids)


def test_a_continuation_that_ends_at_once_is_empty_and_has_no_likelihood(
    bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending_at(monkeypatch, set(range(len(WORDS))))
    (done,) = run(bridge, planted_sae, [Request("he is")])
    assert (done.text, done.token_ids, done.nll) == ("", (), None)
    (row,) = generate(bridge, planted_sae, plan_of(planted_sae, 0.5), ["he is"]).rows
    assert (row.nll, row.valence, row.degenerate) == (None, 0.0, False)


def test_end_tokens_are_the_tokenizers_and_the_models(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = bridge.original_model.generation_config
    for given_ids, expected in ((None, {2}), (9, {2, 9}), ([9, 11], {2, 9, 11})):
        monkeypatch.setattr(config, "eos_token_id", given_ids)
        assert generation.end_tokens(bridge) == expected


def test_equal_requests_are_generated_once(bridge: Any, planted_sae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    write = generation.write
    monkeypatch.setattr(
        generation, "write", lambda forward, batch, *rest: sizes.append(len(batch)) or write(forward, batch, *rest)
    )
    greedy = [Request("he is", seed=seed) for seed in range(3)]
    sampled = [Request("he is", temperature=1.0, seed=seed) for seed in (0, 1, 0)]
    done = run(bridge, planted_sae, [*greedy, *sampled])
    assert sizes == [3]
    assert done[0].text == done[1].text == done[2].text and done[3] == done[5]
    assert [one.request for one in done] == [*greedy, *sampled]


def test_the_text_has_no_prompt_and_keeps_its_leading_space(bridge: Any, planted_sae: Any) -> None:
    (done,) = run(bridge, planted_sae, [Request("he is such a")])
    assert done.text == "".join(f" {WORDS[token]}" for token in done.token_ids)


def test_steering_towards_a_planted_feature_writes_its_word(hooked_transformer: Any) -> None:
    planted = make_sae()
    with torch.no_grad():
        planted.W_dec[JOY] = torch.nn.functional.normalize(hooked_transformer.W_U[:, JOY_TOKEN], dim=0)
    prompts = ["he is such a", "w3 w4", "w5"]
    requests = [Request(prompt, plan_of(planted, amount)) for prompt in prompts for amount in (0.0, 5.0)]
    done = run(hooked_transformer, planted, requests)
    share = [[one.token_ids.count(JOY_TOKEN) / NEW for one in done[amount::2]] for amount in (0, 1)]
    assert sum(share[0]) < 0.5 and min(share[1]) == 1


def test_an_amount_that_breaks_the_model_is_named(bridge: Any, planted_sae: Any) -> None:
    plan = SteeringPlan.of({JOY: 1e39}, planted_sae, unit="raw")
    with pytest.raises(ValueError, match=r"'he is' are not finite; steered by SteeringPlan.add \+1e\+39 x feature 7"):
        run(bridge, planted_sae, [Request("w3"), Request("he is", plan)])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([1, 2, 3, 16, 17, 100, 1000]),
    temperature=st.sampled_from([1e-30, 0.1, 0.7, 1.0, 3.0]),
    draw=st.one_of(st.floats(0, 1, exclude_max=True), st.just(1 - 2**-53), st.just(0.0)),
)
def test_a_sampled_token_is_the_one_in_which_the_draw_falls(
    seed: int, vocabulary: int, temperature: float, draw: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, size=vocabulary).astype(np.float32)
    logits[rng.random(vocabulary) < 0.3] = -np.inf
    logits[rng.integers(vocabulary)] = 5.0
    rows = torch.from_numpy(np.stack([logits, logits]))
    sampled, greedy = choose(
        rows, sampling([temperature, 0.0]), torch.tensor([draw, draw], dtype=torch.float64)
    ).tolist()
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    bounds = np.r_[0, np.cumsum(weights) / weights.sum()]
    assert greedy == int(logits.argmax())
    assert weights[sampled] > 0
    assert bounds[sampled] - 1e-6 <= draw <= bounds[sampled + 1] + 1e-6


def sampling(temperatures: list[float], top_k: int = 0, top_p: float = 1.0) -> Sampling:
    n = len(temperatures)
    return Sampling(torch.tensor(temperatures), torch.full((n,), top_k), torch.full((n,), top_p))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 1000]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 1.0]),
)
def test_only_the_likeliest_tokens_are_drawn_as_transformers_has_it(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(seed)) * 3
    warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = logits
    for warper in warpers:
        expected = warper(torch.LongTensor(1, 0), torch.FloatTensor(expected))
    draws = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    drawn = choose(logits.expand(400, -1), sampling([temperature] * 400, top_k, top_p), draws)
    counts = torch.bincount(drawn, minlength=50)
    shares = expected[0].softmax(0)
    assert (counts[shares == 0] == 0).all()
    assert (counts / 400 - shares).abs().max() < 1 / 200


def test_top_k_of_one_is_greedy_and_limits_are_each_rows_own(bridge: Any, planted_sae: Any) -> None:
    free, narrow, greedy = run(
        bridge, planted_sae,
        [Request("he is", None, 1.5, 3), Request("he is", None, 1.5, 3, top_k=1), Request("he is")],
    )  # fmt: skip
    assert narrow.token_ids == greedy.token_ids != free.token_ids
    with pytest.raises(ValueError, match="top_k is -1"):
        Request("he is", top_k=-1)
    with pytest.raises(ValueError, match="top_p is 0"):
        Request("he is", top_p=0)


def test_a_text_ends_before_a_stop_string(bridge: Any, planted_sae: Any) -> None:
    requests = [Request(prompt, None, 1.0, seed) for prompt in ("he is", "w3 w4 w5") for seed in range(4)]
    whole = run(bridge, planted_sae, requests)
    word = whole[0].text.split()[2]
    stopped = run(bridge, planted_sae, requests, stop=[word, "never"])
    assert stopped[0].text == whole[0].text[: whole[0].text.index(word)]
    assert len(stopped[0].token_ids) < len(whole[0].token_ids)
    for before, after in zip(whole, stopped, strict=True):
        assert after.text == before.text.split(word)[0]
        assert before.token_ids[: len(after.token_ids)] == after.token_ids
    for stop in ("word", ["a", ""]):
        with pytest.raises(ValueError, match="stop must be a list"):
            run(bridge, planted_sae, requests, stop=stop)


def test_a_large_vocabulary_is_sampled_exactly() -> None:
    logits = torch.randn(1, 262_144, generator=torch.Generator().manual_seed(0)).expand(40, -1)
    draws = torch.linspace(0, 0.9999, 40, dtype=torch.float64)
    chosen = choose(logits, sampling([1.0] * 40), draws)
    bounds = torch.cat([torch.zeros(1), logits[0].double().softmax(0).cumsum(0)])
    # A token has a probability of about 4e-6 here: a draw must land within a hundredth of one.
    assert (bounds[chosen] - 4e-8 <= draws).all() and (draws <= bounds[chosen + 1] + 4e-8).all()


def test_the_likelihood_of_a_steered_text_is_the_unsteered_models(bridge: Any, planted_sae: Any) -> None:
    (done,) = run(bridge, planted_sae, [Request("he is such a", plan_of(planted_sae, 3.0))])
    assert done.nll == pytest.approx(continuation_nll(bridge, [((BOS, 4, 5, 6, 7), done.token_ids)])[0])
    with steering(bridge, planted_sae, plan_of(planted_sae, 3.0)):
        (steered,) = continuation_nll(bridge, [((BOS, 4, 5, 6, 7), done.token_ids)])
    assert done.nll is not None and steered < done.nll


def test_generating_sets_every_prompt_beside_its_baseline(bridge: Any, planted_sae: Any, tmp_path: Path) -> None:
    plan, prompts = plan_of(planted_sae, 2.0, 1.0), ["he is such a", "w3"]
    made = generate(
        bridge, planted_sae, plan, prompts, max_new_tokens=NEW, temperature=1, seed=5, emotion="joy", part="report"
    )
    assert [row.prompt for row in made.rows] == prompts
    for row in made.rows:
        steered, baseline = run(bridge, planted_sae, [Request(row.prompt, p, 1.0, 5) for p in (plan, None)])
        assert (row.text, row.nll, row.baseline_text, row.baseline_nll) == (
            steered.text,
            pytest.approx(steered.nll, abs=1e-5),
            baseline.text,
            pytest.approx(baseline.nll, abs=1e-5),
        )
        assert (row.valence, row.baseline_valence) == (valence(row.text), valence(row.baseline_text))
        assert (row.features, row.amount, row.mode, row.unit) == ((7, 8), 3.0, "add", "residual_norm")
        assert (row.temperature, row.seed, row.emotion, row.part) == (1.0, 5, "joy", "report")
    assert made.meta["plan"] == plan.to_dict() and made.meta["max_new_tokens"] == NEW
    assert Generations.load(made.save(tmp_path / "generations.json")) == made


def test_judged_rows_find_their_baselines_by_prompt_and_decoding(planted_sae: Any) -> None:
    plan = plan_of(planted_sae, 1.0)
    looping = tuple([5, 6] * 10)
    steered = [
        Continuation(Request("a", plan, 0.7, seed=2), " happy", (9,), 1.0),
        Continuation(Request("a", plan, 0.0, seed=9), " sad", looping, 2.0),
    ]
    baselines = [
        Continuation(Request("b"), " other", (1,), 9.0),
        Continuation(Request("a", None, 0.7, seed=1), " wrong seed", (1,), 9.0),
        Continuation(Request("a", None, 0.7, seed=2), " sampled", (1,), 3.0),
        Continuation(Request("a"), " greedy", (1,), 4.0),
    ]
    rows = judge_rows(steered, baselines, emotion="joy")
    assert [(row.baseline_text, row.baseline_nll) for row in rows] == [(" sampled", 3.0), (" greedy", 4.0)]
    assert [row.degenerate for row in rows] == [False, is_degenerate(looping)] == [False, True]
    assert [row.valence for row in rows] == [valence("happy"), valence("sad")]
    with pytest.raises(ValueError, match=r"'a' at temperature 0.7 with seed 2"):
        judge_rows(steered, baselines[:2])
    with pytest.raises(ValueError, match="'b' is not steered"):
        judge_rows(baselines, baselines)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prompt": ""}, "the prompt '' is empty"),
        ({"prompt": " \n"}, "is empty"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_a_wrong_request_is_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Request(**{"prompt": "he is", **wrong})


def test_what_cannot_be_generated_is_refused_by_name(bridge: Any, planted_sae: Any) -> None:
    long = " ".join(["w3"] * 60)
    other = plan_of(make_sae(hook_name="blocks.1.hook_resid_post"), 1.0)
    for requests, options, named in (
        ([], {}, "list is empty"),
        ([Request("a")], {"max_new_tokens": 0}, r"max_new_tokens \(0\)"),
        ([Request("a")], {"batch_rows": 0}, r"batch_rows \(0\)"),
        ([Request(long)], {}, "60 tokens; 57 fit the model's context of 64 with 6 new"),
        ([Request("a", other)], {}, "the plan steers blocks.1"),
    ):
        with pytest.raises(ValueError, match=named):
            run(bridge, planted_sae, requests, **options)
    with pytest.raises(ValueError, match="list of strings"):
        generate(bridge, planted_sae, plan_of(planted_sae, 1.0), "he is")
    with pytest.raises(ValueError, match="48 dimensions"):
        run(bridge, make_sae(d_in=48), [Request("a")])
    assert len(run(bridge, planted_sae, [Request(" ".join(["w3"] * 57))])[0].token_ids) <= NEW


@pytest.mark.slow
def test_the_embedded_model_writes_the_same_greedy_text_in_every_batch_with_and_without_cache(embedded: Any) -> None:
    sae = make_sae(hook_name="blocks.9.hook_resid_post", d_in=640)
    plan = SteeringPlan.of({JOY: 0.05, 3: -0.03}, sae, residual_norm=6400.0)
    prompts = ["he is such a", "The train arrived", "On Monday my neighbour told me that the", "I"]
    requests = [Request(prompt, p) for prompt in prompts for p in (plan, None)]
    together = run(embedded, sae, requests, max_new_tokens=8)
    alone = run(embedded, sae, requests, max_new_tokens=8, batch_rows=1)
    assert [(one.text, one.token_ids) for one in together] == [(one.text, one.token_ids) for one in alone]
    assert [one.nll for one in together] == pytest.approx([one.nll for one in alone], abs=1e-4)
    recomputed = run(embedded, sae, requests, max_new_tokens=8, use_cache=False)
    assert [one.text for one in together] == [one.text for one in recomputed]
    assert len({one.text for one in together}) == len(requests)


def test_an_unsteered_text_has_the_same_likelihood_whether_it_is_read_off_while_writing_or_asked_for(
    model: Any, planted_sae: Any
) -> None:
    requests = [
        Request(prompt, None, t, seed) for prompt in ("he is such a", "w3 w9") for t, seed in ((0, 0), (1.0, 4))
    ]
    for done in complete(model, planted_sae, requests, max_new_tokens=NEW, progress=False):
        prompt = tuple(prompt_tokens(model, planted_sae, done.request.prompt, NEW))
        asked = continuation_nll(model, [(prompt, done.token_ids)])[0] if done.token_ids else None
        assert done.nll == pytest.approx(asked, abs=1e-5)
    silent = complete(model, planted_sae, requests, max_new_tokens=NEW, progress=False, with_nll=False)
    assert [done.nll for done in silent] == [None] * len(requests)


def test_the_expected_next_token_is_the_mean_over_the_steered_distribution(model: Any, planted_sae: Any) -> None:
    values = torch.randn(len(WORDS), generator=torch.Generator().manual_seed(0))
    requests = [
        Request(prompt, plan) for plan in (None, plan_of(planted_sae, 2.0)) for prompt in ("he is", "w3 w9 joy")
    ]
    found = expected_next_token(model, planted_sae, requests, values, progress=False)
    for request, mean in zip(requests, found, strict=True):
        tokens = torch.tensor([prompt_tokens(model, planted_sae, request.prompt, 1)])
        with torch.inference_mode(), steering(model, planted_sae, request.plan) if request.plan else nullcontext():
            expected = model(tokens)[0, -1].float().softmax(-1) @ values
        assert mean == pytest.approx(float(expected), abs=1e-5)
    assert found[0] != pytest.approx(found[2], abs=1e-3)
