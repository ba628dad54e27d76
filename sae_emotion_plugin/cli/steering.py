"""The commands that steer: continue prompts, measure a dose-response, take a plan out of the tool."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sae_emotion_plugin.cli.options import dictionary_option, json_option, model_option
from sae_emotion_plugin.files import check_folder

if TYPE_CHECKING:
    from sae_emotion_plugin.interventions.plans import SteeringPlan

MODES = ("add", "clamp", "scale", "ablate", "project-out")
UNITS = ("residual_norm", "max_activation", "activation", "raw")


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--feature", "features", multiple=True, metavar="N=AMOUNT", help="A feature and its amount (repeatable).")
@click.option("--emotion", help="Steer with the best features of this emotion instead of --feature.")
@click.option("--scores", type=click.Path(path_type=Path), help="scores.json for --emotion, as discover writes it.")
@click.option("--features-used", default=3, show_default=True, help="With --emotion: how many features share --amount.")
@click.option(
    "--rank",
    type=click.Choice(["causal", "auroc"]),
    default="causal",
    show_default=True,
    help="With --emotion: which of its 20 best features: those that make its words likelier, or tell its texts best.",
)
@click.option("--amount", default=0.1, show_default=True, help="With --emotion: the amount, shared by its features.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Steer by this plan (JSON) instead.")
@click.option("--force", is_flag=True, help="With --plan: use it though it was made for another dictionary or model.")
@click.option("--save-plan", type=click.Path(path_type=Path), help="Write the plan there, as JSON.")
@click.option("--mode", type=click.Choice(MODES), default="add", show_default=True, help="What happens to a feature.")
@click.option("--unit", type=click.Choice(UNITS), default="residual_norm", show_default=True, help="Of the amounts.")
@click.option("--actual", metavar="TEXT", help="Each feature's amount times its largest activation on this text.")
@click.option("--at", multiple=True, metavar="HOOK", help="Act at this hook and not at the dictionary's (repeatable).")
@click.option(
    "--positions", default="all", show_default=True, help="all, prompt, generated, last, or a range such as 2:5."
)
@click.option("--first-tokens", type=int, help="Steer only that many generated tokens.")
@click.option("--decay", default=1.0, show_default=True, help="Factor from one generated token to the next.")
@click.option("--gate", metavar="N>ACTIVATION", help="Steer only tokens on which feature N is more active than that.")
@click.option("--no-error-term", is_flag=True, help="Replace the activation by the dictionary's reconstruction.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="Draw among that many likeliest tokens; 0 for all.")
@click.option(
    "--top-p", default=1.0, show_default=True, help="Draw among the likeliest with this probability together."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the sampling.")
@click.option("--tokens", default=20, show_default=True, help="Tokens to generate.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End a continuation before this text (repeatable).")
@click.option("--stream", "streamed", is_flag=True, help="Print the steered text of one PROMPT as it is written.")
@click.option(
    "--sweep",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Measure the dose-response of the features on fixed openings instead; FOLDER keeps what is done.",
)
@click.option("--openings", type=int, help="With --sweep: how many openings (default: all of the language).")
@click.option("--seeds", default=3, show_default=True, help="With --sweep: texts for each opening and dose.")
@model_option
@dictionary_option
@json_option
def steer(
    prompts: tuple[str, ...],
    features: tuple[str, ...],
    emotion: str | None,
    scores: Path | None,
    features_used: int,
    rank: str,
    amount: float,
    plan_file: Path | None,
    force: bool,
    save_plan: Path | None,
    mode: Any,
    unit: Any,
    actual: str | None,
    at: tuple[str, ...],
    positions: str,
    first_tokens: int | None,
    decay: float,
    gate: str | None,
    no_error_term: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    tokens: int,
    stop: tuple[str, ...],
    streamed: bool,
    sweep: Path | None,
    openings: int | None,
    seeds: int,
    model: str,
    dictionary: str,
    as_json: bool,
) -> None:
    """Continue every PROMPT without and with steering, or measure what doses do (--sweep).

    Amounts are fractions of the mean residual norm at the dictionary's hook, unless --unit says otherwise; 0.1 is a
    usual one. For scale, ablate and project-out they are factors: 1 ablates all of a feature.
    """
    amounts = dict(_amount(text) for text in features)
    if sweep:
        if prompts or plan_file or not emotion or bool(amounts) == bool(scores):
            raise ValueError("--sweep needs --emotion NAME, with --scores FILE or --feature N=AMOUNT, and no PROMPT")
        check_folder(sweep)
    elif not prompts:
        raise ValueError("no PROMPT to continue (or --sweep FOLDER)")
    elif [bool(amounts), bool(emotion), bool(plan_file)].count(True) != 1:
        raise ValueError("give either --feature N=AMOUNT (repeatable), --emotion NAME --scores FILE, or --plan FILE")
    elif emotion and scores is None:
        raise ValueError(f"--emotion {emotion} needs --scores FILE (written by discover or quickstart)")
    if streamed and (len(prompts) != 1 or as_json):
        raise ValueError("--stream prints the text of one PROMPT, and no JSON")
    if save_plan:
        check_folder(save_plan)
    opened = _gate(gate) if gate else None
    candidates: tuple[int, ...] = ()
    if scores is not None and emotion:
        from sae_emotion_plugin.discovery.scores import FeatureScores
        from sae_emotion_plugin.feature_roles.output_scores import CANDIDATES

        best = FeatureScores.load(scores).top(emotion, max(features_used, CANDIDATES if rank == "causal" else 1))
        candidates = tuple(row.feature for row in best)

    from sae_emotion_plugin.interventions.plans import SteeringPlan
    from sae_emotion_plugin.models import load_model
    from sae_emotion_plugin.plugin import load_dictionary

    given = SteeringPlan.load(plan_file) if plan_file else None
    sae = load_dictionary(dictionary)
    hooked = load_model(model)
    if emotion and candidates:
        if rank == "causal":
            from sae_emotion_plugin.feature_roles.output_scores import steering_order

            candidates = steering_order(hooked, sae, emotion, candidates)
        used = candidates[:features_used]
        amounts = {feature: amount / len(used) for feature in used}
    if sweep and emotion:
        _sweep(hooked, sae, emotion, list(amounts), sweep, openings, seeds, temperature or 0.7, tokens, as_json)
        return
    if given is None:
        where = {"positions": positions, "first_tokens": first_tokens, "decay": decay, "keep_error": not no_error_term}
        where |= {"at": at, "gate": opened}
        plan = _plan(hooked, sae, amounts, mode, unit, actual, where)
    else:
        plan = given.unbound() if force else given
    if save_plan:
        plan.save(save_plan)
    if streamed:
        from sae_emotion_plugin.generation.decoding import Request
        from sae_emotion_plugin.generation.streaming import stream

        request = Request(prompts[0], plan, temperature, seed, top_k, top_p)
        click.echo(prompts[0], nl=False)
        for token in stream(hooked, sae, request, max_new_tokens=tokens, stop=stop):
            click.echo(token.text, nl=False)
        click.echo()
        return

    from sae_emotion_plugin.generation.continuations import generate

    made = generate(
        *(hooked, sae, plan, prompts),
        max_new_tokens=tokens,
        temperature=temperature,
        seed=seed,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        emotion=emotion or "",
    )
    if as_json:
        click.echo(json.dumps({"meta": made.meta, "rows": [vars(row) for row in made.rows]}, ensure_ascii=False))
    else:
        click.echo(repr(made))


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--form",
    type=click.Choice(["safetensors", "gguf", "hook", "lm-eval", "neuronpedia"]),
    required=True,
    help="What the file is for.",
)
@click.option("--force", is_flag=True, help="Export though the plan was made for another dictionary or model.")
@click.option("--model", help="Check the plan against this model, and name it in the file.")
@dictionary_option
@json_option
def export(plan: Path, out: Path, form: str, force: bool, model: str | None, dictionary: str, as_json: bool) -> None:
    """Write PLAN (JSON, from steer --save-plan) to OUT for use without this tool.

    safetensors: a vector for each hook; gguf: a control vector for llama.cpp; hook: a Python file that steers a
    transformers model; lm-eval: a steering file of lm-evaluation-harness; neuronpedia: a steer request and vectors.
    What a form cannot carry is refused by name.
    """
    check_folder(out)

    from sae_emotion_plugin.interventions.exports import export_plan
    from sae_emotion_plugin.interventions.plans import SteeringPlan
    from sae_emotion_plugin.models import load_model
    from sae_emotion_plugin.plugin import load_dictionary

    read = SteeringPlan.load(plan)
    written = export_plan(
        read.unbound() if force else read,
        load_dictionary(dictionary),
        out,
        form,
        model=load_model(model) if model else None,
    )
    click.echo(json.dumps({"file": str(written)}) if as_json else f"written to {written}")


@click.command()
@click.argument("recipe", metavar="RECIPE")
@click.option("--scores", type=click.Path(path_type=Path), help="scores.json instead of the recipe's features.")
@click.option("--tokens", type=int, help="Tokens to generate, instead of the recipe's.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Also write the tables there, as JSON.")
@json_option
def study(recipe: str, scores: Path | None, tokens: int | None, out: Path | None, as_json: bool) -> None:
    """Redo a published demonstration: one feature, two, three ..., greedy and sampled, beside the published lines.

    RECIPE is blog-embedded, blog-gpt2 (needs a model hub), or a YAML file.
    """
    if out:
        check_folder(out)

    from dataclasses import replace

    from sae_emotion_plugin.discovery.scores import FeatureScores
    from sae_emotion_plugin.steering_recipes import StudyRecipe, run_study

    read = StudyRecipe.read(recipe)
    tables = run_study(
        replace(read, max_new_tokens=tokens) if tokens else read, scores=FeatureScores.load(scores) if scores else None
    )
    if out:
        tables.save(out)
    click.echo(json.dumps(tables.to_dict(), ensure_ascii=False) if as_json else repr(tables))


def _plan(
    model: Any, sae: Any, amounts: dict[int, float], mode: Any, unit: Any, actual: str | None, where: dict[str, Any]
) -> "SteeringPlan":
    from sae_emotion_plugin.activations import mean_norm
    from sae_emotion_plugin.emotion_texts import LabelledTexts, openings
    from sae_emotion_plugin.interventions.hooks import activations_on
    from sae_emotion_plugin.interventions.plans import SteeringPlan
    from sae_emotion_plugin.sparse_codes import checked_hook, token_settings

    if actual is not None:
        if unit != "residual_norm":
            raise ValueError(f"--actual measures activations: it takes no --unit {unit}")
        found = activations_on(model, sae, list(amounts), [actual])
        amounts, unit = {feature: times * found[feature] for feature, times in amounts.items()}, "activation"
    norm = largest = None
    if unit == "residual_norm" and mode in ("add", "clamp"):
        norm = mean_norm(model, openings("neutral"), checked_hook(model, sae), **token_settings(sae))
    if unit == "max_activation":
        largest = activations_on(model, sae, list(amounts), LabelledTexts.bundled("en").texts)
    return SteeringPlan.of(
        amounts, sae, residual_norm=norm, mode=mode, unit=unit, max_activations=largest, model=model, **where
    )


def _sweep(
    model: Any,
    sae: Any,
    emotion: str,
    features: list[int],
    folder: Path,
    n_openings: int | None,
    n_seeds: int,
    temperature: float,
    tokens: int,
    as_json: bool,
) -> None:
    from sae_emotion_plugin.dose_study import sweep_study
    from sae_emotion_plugin.emotion_texts import study_openings

    prompts = study_openings()
    swept = sweep_study(
        model,
        sae,
        {emotion: features},
        prompts=prompts[:: max(1, len(prompts) // n_openings)][:n_openings] if n_openings else prompts,
        seeds=tuple(range(n_seeds)),
        temperature=temperature,
        max_new_tokens=tokens,
        folder=folder,
    )
    click.echo(json.dumps(swept.response.to_dict(), ensure_ascii=False) if as_json else repr(swept))
    click.echo(f"The page is at {(folder / 'sweep.html').resolve()}", err=True)


def _amount(text: str) -> tuple[int, float]:
    number, _, amount = text.partition("=")
    try:
        return int(number), float(amount)
    except ValueError:
        raise ValueError(f"--feature {text!r} is not of the form N=AMOUNT, for example 1234=0.1") from None


def _gate(text: str) -> Any:
    from sae_emotion_plugin.interventions.plans import Gate

    number, _, above = text.partition(">")
    try:
        return Gate(int(number), float(above))
    except ValueError:
        raise ValueError(f"--gate {text!r} is not of the form N>ACTIVATION, for example 1234>2.5") from None
