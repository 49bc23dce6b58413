"""`dgpo eval` and `dgpo compare`: score a model, on held-out prompts or a suite, and compare two of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli_options import Json, emit, screen
from services.config_file import ConfigError

if TYPE_CHECKING:
    from services.evaluate import Evaluated
    from services.suites.prompts import Suite
    from services.suites.run import SuiteEvaluation


def evaluate(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="A run directory, one of its checkpoints, a pipeline, an exported LoRA, or a hub id."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="The same, as an option.", show_default=False)
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Prompts, rewards and sampling; default: those of the run.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit, of a hub id.")
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help="ema or policy, of a checkpoint.")] = "ema",
    rewards: Annotated[
        list[str] | None,
        typer.Option(
            "--rewards",
            metavar="NAME",
            help="Rewards of the recipe or scorers (dgpo reward list) by name, several with commas; a scorer "
            "with arguments as NAME={JSON}. May be repeated; default: the recipe's.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="geneval, ocr, drawbench, heldout, a file of prompts, or dataset:NAME@COMMIT[:SPLIT].",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", help="With --suite drawbench: its list, a file or dataset:NAME@COMMIT."),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option("--text-column", help="Of a list of prompts, what holds the text.")
    ] = None,
    tag_column: Annotated[
        str | None, typer.Option("--tag-column", help="What holds the tag that scores are told by.")
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Images a prompt; 1.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first prompts.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the evaluation; one that was begun is gone on with."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Rollout workers; default: the recipe's.")
    ] = None,
    other_base: Annotated[
        bool,
        typer.Option("--other-base", help="Of an exported LoRA: on a base that it was not trained on, too."),
    ] = False,
    images: Annotated[bool, typer.Option("--images", help="Keep every image, beside the sheets.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", help="Override a value of the recipe; may be repeated."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a model: on held-out prompts, in this process; or on a --suite, over rollout workers.

    With a suite: scores by tag, contact sheets, a folder that goes on where it was interrupted. Two of them:
    dgpo compare.
    """
    if model is not None and checkpoint is not None:
        raise ConfigError("give MODEL or --checkpoint, not both: they mean the same")
    if model is None and checkpoint is None:
        raise ConfigError("give what to evaluate: MODEL, or --checkpoint")
    place = model or checkpoint
    assert place is not None
    settings = tuple(overrides or ())
    if suite is None:
        told = {
            "--prompts": prompts,
            "--text-column": text_column,
            "--tag-column": tag_column,
            "--samples": samples,
            "--limit": limit,
            "--out": out,
            "--workers": workers,
            "--images": images or None,
        }
        if given := [name for name, value in told.items() if value is not None]:
            raise ConfigError(
                f"{', '.join(given)}: for an evaluation of a suite; add --suite (heldout: the prompts of an "
                "evaluation without one)"
            )
        from services.evaluate import evaluate_model

        result = evaluate_model(place, recipe, weights, settings, screen, rewards, revision, other_base)
    else:
        from services.evaluate import to_evaluate
        from services.suites.prompts import Columns, load_suite

        if workers is not None:
            settings = (*settings, f"rollout.workers={workers}")
        found = to_evaluate(
            place, recipe, settings, weights=weights, revision=revision, other_base=other_base
        )
        chosen = load_suite(
            suite, found.config, prompts=prompts, columns=Columns(text_column, tag_column), limit=limit
        )
        result = _evaluate_suite(
            place,
            found,
            chosen,
            rewards or [],
            samples=samples or 1,
            out=out,
            images=images,
        )
    if as_json:
        emit(result)


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of an evaluation (dgpo eval --suite ... --out).")],
    second: Annotated[Path, typer.Argument(help="Another one, of the same prompts and seeds.")],
    common: Annotated[
        bool, typer.Option("--common", help="Compare what both have, where one has more or is not finished.")
    ] = False,
    confidence: Annotated[
        float, typer.Option("--confidence", min=0.5, max=0.999, help="Of the intervals.")
    ] = 0.95,
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Of the bootstrap.")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare two evaluations of a suite: paired differences by reward and tag, with confidence intervals."""
    from services.suites.compare import compare as differences
    from services.suites.compare import comparison_table

    found = differences(first, second, common=common, confidence=confidence, resamples=resamples, seed=seed)
    _say(f"first:  {first}\nsecond: {second}")
    if found["otherwise"]:
        told = "\n".join(f"  {line}" for line in found["otherwise"])
        _say(f"beside their scores they differ in:\n{told}")
    screen.print(comparison_table(found))
    if as_json:
        emit(found)


def _evaluate_suite(
    model: Path,
    found: Evaluated,
    suite: Suite,
    rewards: list[str],
    *,
    samples: int,
    out: Path | None,
    images: bool,
) -> dict[str, Any]:
    from services.suites.run import SuiteEvaluation, evaluate_suite
    from services.suites.settings import with_rewards, without_prompts
    from services.suites.summary import table

    evaluation = SuiteEvaluation(
        config=without_prompts(with_rewards(found.config, rewards)),
        weights=found.weights,
        kind=found.kind,
        suite=suite,
        samples=samples,
        keep_images=images,
        base_digest=found.base_digest,
    )
    folder = out or _default_folder(model, evaluation)
    result = evaluate_suite(evaluation, folder, screen)
    screen.print(table(result))
    _say(f"written to {folder}")
    return result


def _default_folder(model: Path, evaluation: SuiteEvaluation) -> Path:
    """In the run's directory, beside that of a pipeline or a LoRA, or here for a model of the hub."""
    label = _label(Path(evaluation.suite.name).stem)
    if evaluation.kind in ("ema", "policy"):
        assert evaluation.weights is not None
        checkpoint = evaluation.weights.resolve()
        return checkpoint.parent.parent / "evaluations" / f"{checkpoint.name}-{evaluation.kind}-{label}"
    if model.is_dir():
        return model.resolve().parent / "evaluations" / f"{model.resolve().name}-{label}"
    revision = evaluation.config.model.revision
    return Path("evaluations") / f"{_label('@'.join(filter(None, (str(model), revision))))}-{label}"


def _label(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)


def _say(text: str) -> None:
    screen.print(text, highlight=False, soft_wrap=True, markup=False)
