"""The command line: a thin layer over the verbs. Logs go to stderr, results to stdout; exit codes as in DESIGN §2."""

from __future__ import annotations

import gc
import importlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from slimwright import __version__
from slimwright.errors import InputError, NotBuiltError, SlimwrightError

app = typer.Typer(
    name="slimwright", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Fit a pretrained model to a budget.", context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
cache_app = typer.Typer(no_args_is_help=True, help="What is cached: where it is, how much.")
app.add_typer(cache_app, name="cache")

INTERRUPTED = 130

# Before torch loads its thread library: threads that wait for others sleep instead of spinning. On a machine that
# others use too, spinning made a verification 14 times slower; on a quiet one it gains next to nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _help_all(context: typer.Context, asked: bool) -> None:
    if asked:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help())
        raise typer.Exit


HelpAll = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=_help_all, help="Show every option and exit.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, logs on stderr.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", hidden=True, help="Run code that comes with the model.")]


def _imported(name: str) -> Any:
    """A module, imported without looking for garbage: torch makes a million objects that all stay, and looking through
    them, now and at the end, takes a fifth of the time that a small merge has."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _later(name: str) -> Any:
    """An option that is designed but not built: hidden, refused by name when given."""
    return typer.Option(name, hidden=True, help="Not built in this version.")


def _refuse(**given: object) -> None:
    for name, value in given.items():
        if value not in (None, [], False):
            raise NotBuiltError(f"--{name.replace('_', '-')} is designed but not built in this version of slimwright.")


@app.command()
def fit(
    model: Annotated[
        str, typer.Argument(help="Model directory, hub id, hub-id@revision, sentence-transformers directory, zoo:NAME.")
    ],
    out: Annotated[str | None, typer.Option(help="Directory for the result.")] = None,
    size: Annotated[str | None, typer.Option(help="Limit of the weight files: 4.25bit, 30%, 4.7GB.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Limit of the running result: weights, KV cache, workspace, e.g. 6GB.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Floor: kl:0.02, top1:99%, ppl:1%, ndcg@10:1%, ./eval.sh:0.5; repeatable."),
    ] = None,
    grid: Annotated[str | None, typer.Option(help="One grid everywhere, e.g. int4:g128, or lowrank:r64.")] = None,
    rule: Annotated[
        list[str] | None, typer.Option(hidden=True, help="'PATTERN: keep' or 'PATTERN: GRID'; repeatable.")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="Run this plan.yaml.")] = None,
    job_memory: Annotated[
        str | None, typer.Option(help="Memory the job may use, e.g. 2GB (default: 80 % of free).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Forecast only.")] = False,
    as_json: Json = False,
    help_all: HelpAll = False,
    data: Annotated[
        str | None,
        typer.Option(help="Data to calibrate on: a file, folder, dataset, or none."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(hidden=True, help="Tokens that --memory is to hold (default: 4096 or the model's).")
    ] = None,
    batch: Annotated[int | None, typer.Option(hidden=True, help="Sequences that --memory is to hold.")] = None,
    eval_tokens: Annotated[int | None, typer.Option(hidden=True, help="Tokens to measure the quality on.")] = None,
    eval_queries: Annotated[
        int | None, typer.Option(hidden=True, help="Queries to measure an encoder's nDCG@10 on (default: 300).")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(hidden=True, help="Data to measure the result's quality on.")] = None,
    method: Annotated[
        str | None, typer.Option(hidden=True, help="Solver: NAME[,knob=value...] (default: GPTQ, without data RTN).")
    ] = None,
    fold: Annotated[
        list[str] | None,
        typer.Option(hidden=True, help="Before rounding: fold/rotation, fold/awq, ... or none; repeatable."),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(hidden=True, help="Round what enters linear layers: int8 or fp8, :token or :tensor."),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(hidden=True, help="How keys and values are cached: cache/kivi,bits=4 (8, 4, 2).")
    ] = None,
    calibration_tokens: Annotated[int | None, typer.Option(hidden=True, help="Tokens to calibrate on.")] = None,
    calibration_length: Annotated[
        int | None, typer.Option(hidden=True, help="Tokens of a sequence (default 512 or the model's positions).")
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            hidden=True, help="Budget solver: dp, milp, closed-form, rate-distortion or evolutionary, with knobs."
        ),
    ] = "dp",
    loss: Annotated[
        str | None,
        typer.Option(
            hidden=True, help="What options are thought to cost: sensitivity, weight-error, lim, zd, measured or pairs."
        ),
    ] = None,
    job_time: Annotated[str | None, typer.Option(hidden=True, help="Stop after this long: 600, 10m, 2h.")] = None,
    statistics_cache: Annotated[
        str, typer.Option(hidden=True, help="Cache for what walks find, for other sizes of the same job; or off.")
    ] = "2GB",
    device: Annotated[str, typer.Option(hidden=True, help="auto or cpu.")] = "auto",
    seed: Annotated[int, typer.Option(hidden=True, help="Seed of everything random.")] = 0,
    shard_size: Annotated[str, typer.Option(hidden=True, help="Largest weight file.")] = "5GB",
    trust_remote_code: Remote = False,
    latency: Annotated[str | None, _later("--latency")] = None,
    allow: Annotated[
        str | None, typer.Option(hidden=True, help="Families that a search may use beside the default: drop.")
    ] = None,
    effort: Annotated[str | None, _later("--effort")] = None,
    target: Annotated[
        str | None,
        typer.Option(hidden=True, help="Who loads it: slimwright, compressed-tensors, gguf, or auto."),
    ] = None,
    adapter: Annotated[list[str] | None, _later("--adapter")] = None,
    ray: Annotated[str | None, _later("--ray")] = None,
) -> None:
    """Fit MODEL to a limit: quantize it, prove the result, publish it with a report."""
    _refuse(
        latency=latency, effort=effort, adapter=adapter, ray=ray,
    )  # fmt: skip
    from slimwright.job.fit import fit as run
    from slimwright.sizes import parse_bytes

    report = run(
        model, out, size=size, memory=memory, context=context, batch=batch, keep=tuple(keep or ()),
        eval_tokens=eval_tokens, eval_queries=eval_queries,
        grid=grid, rules=tuple(rule or ()), plan=plan, job_memory=job_memory, dry_run=dry_run,
        data=data, eval_data=eval_data, calibration_tokens=calibration_tokens, calibration_length=calibration_length,
        allow=tuple(allow.split(",")) if allow else (), method=method, target=target,
        folds=None if fold is None else tuple(fold), activations=activations, cache=cache, search=search, loss=loss,
        job_time=None if job_time is None else _seconds(job_time), device=device, seed=seed,
        max_shard_bytes=parse_bytes(shard_size, "--shard-size"), statistics_cache=statistics_cache,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report.data))
        return
    console = Console()
    if dry_run:
        _print_forecast(console, report.data)
        return
    from slimwright.report import terminal_table

    console.print(terminal_table(report.data))
    for note in report.data["notes"]:
        console.print(f"Note: {note}", highlight=False, markup=False)
    assert report.out is not None
    if "target" in report.data:
        form = report.data["target"]
        console.print(f"Written as {form['name']}; loaded in {form['program']}", highlight=False, markup=False)
    console.print(f"Report: {report.out / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Load it with:\n{report.data['how_to_load']}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Model directory, hub id or zoo:NAME.")],
    as_json: Json = False,
    trust_remote_code: Remote = False,
    help_all: HelpAll = False,
) -> None:
    """Show what MODEL is made of: blocks, weights, roles, groups, ties, bytes."""
    import slimwright
    from slimwright.model.render import structure_json, structure_tree

    structure = slimwright.inspect(model, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps(structure_json(structure)))
    else:
        Console().print(structure_tree(structure))


@app.command()
def export(
    directory: Annotated[str, typer.Argument(help="A result of fit.")],
    to: Annotated[
        str, typer.Option(help="safetensors (the dense model), compressed-tensors, gguf or onnx.")
    ] = "safetensors",
    out: Annotated[str | None, typer.Option(help="Directory for what is written.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    as_json: Json = False,
    help_all: HelpAll = False,
    trust_remote_code: Remote = False,
) -> None:
    """Write a result in the form that another program loads; nothing is rounded again."""
    import slimwright
    from slimwright.sizes import parse_bytes

    if out is None:
        raise InputError("Give --out, the directory to write to.")
    report = slimwright.export(
        directory, to=to, out=out, max_shard_bytes=parse_bytes(shard_size, "--shard-size"),
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report.data))
    else:
        Console().print(
            f"Wrote {report.data['size']['after'] / 1e6:.1f} MB to {report.out}.\n"
            f"Load it with:\n{report.data['how_to_load']}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


@app.command()
def measure(
    models: Annotated[list[str], typer.Argument(help="Model directories or hub ids, all of one kind.")],
    reference: Annotated[
        str | None, typer.Option(help="What the others are compared with (default: the first model).")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="NAME=SRC; repeatable. SRC: file, folder, .jsonl, .parquet, stdlib (default)."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas between.")] = None,
    text: Annotated[str, typer.Option(help="Text of each source, at most.")] = "64kB",
    repeats: Annotated[int, typer.Option(help="Processes per model for speed and memory; 0: none.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as stored).")] = "float32",
    out: Annotated[str | None, typer.Option(help="Directory for measure.json and measure.html.")] = None,
    as_json: Json = False,
    help_all: HelpAll = False,
    task_limit: Annotated[int | None, typer.Option(hidden=True, help="Documents of each task.")] = None,
    seed: Annotated[int, typer.Option(hidden=True, help="Seed of everything random.")] = 0,
    trust_remote_code: Remote = False,
) -> None:
    """Measure models side by side: quality with paired intervals, speed, load time, memory."""
    from slimwright.job.measure import measure as run
    from slimwright.report.measure import measure_tables

    report = run(
        *models, reference=reference, data=data or (), tasks=[name for name in (tasks or "").split(",") if name],
        task_limit=task_limit, text=text, repeats=repeats, dtype=dtype, out=out, seed=seed,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report.data))
        return
    console = Console()
    for table in measure_tables(report.data):
        console.print(table)
    for note in report.data["notes"]:
        console.print(f"Note: {note}", highlight=False, markup=False)
    if report.out is not None:
        console.print(f"Report: {report.out / 'measure.html'}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def merge(
    config: Annotated[str, typer.Argument(help="YAML file: our form, or mergekit's.")],
    out: Annotated[str | None, typer.Option(help="Directory for the result.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random masks (default: the file's, else 0).")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Publish without the proof.")] = False,
    job_memory: Annotated[str | None, typer.Option(help="Memory the job may use, e.g. 2GB.")] = None,
    shard_size: Annotated[str | None, typer.Option(hidden=True, help="Largest weight file (default: 5GB).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and forecast only.")] = False,
    as_json: Json = False,
    help_all: HelpAll = False,
    trust_remote_code: Remote = False,
) -> None:
    """Combine checkpoints into one, as CONFIG says; prove the result, publish it."""
    job = _imported("slimwright.job.merge")
    limit = None
    if shard_size is not None:
        from slimwright.sizes import parse_bytes

        limit = parse_bytes(shard_size, "--shard-size")
    report = job.merge(
        config, out, seed=seed, verify=not no_verify, job_memory=job_memory, max_shard_bytes=limit, dry_run=dry_run,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report.data))
    else:
        _print_merge(Console(), report.data, report.out)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="YAML file: named steps of fit, merge, export and measure.")],
    out: Annotated[str | None, typer.Option(help="Directory for the results, one a step.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Order and forecasts only.")] = False,
    as_json: Json = False,
    help_all: HelpAll = False,
) -> None:
    """Do the steps of RECIPE in the order that they need; what is finished is not done again."""
    import slimwright
    from slimwright.report.recipe import recipe_table

    report = slimwright.run(recipe, out, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(report.data))
        return
    console = Console()
    console.print(recipe_table(report.data))
    if report.out is not None:
        console.print(f"Report: {report.out / 'recipe.html'}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def serve(
    directory: Annotated[
        str, typer.Argument(help="A result, or any language model or encoder that transformers loads.")
    ],
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=DIR of a LoRA adapter; repeatable.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; other machines only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="Key that requests must bring (default: SLIMWRIGHT_API_KEY, if set).")
    ] = None,
    slots: Annotated[int, typer.Option(help="Texts that run at once.")] = 16,
    queue: Annotated[int, typer.Option(help="Texts that may wait.")] = 256,
    context: Annotated[int | None, typer.Option(help="Tokens of prompt and answer (default: the model's).")] = None,
    time_limit: Annotated[str, typer.Option(help="A request may take this long: 600, 10m.")] = "10m",
    help_all: HelpAll = False,
    max_body: Annotated[str, typer.Option(hidden=True, help="Size of a request's body.")] = "4MB",
    dtype: Annotated[str, typer.Option(hidden=True, help="float32, bfloat16, float16 or auto (as stored).")] = "auto",
    trust_remote_code: Remote = False,
) -> None:
    """Serve DIRECTORY over HTTP as OpenAI's interface, with a page to look at."""
    import slimwright

    slimwright.serve(
        directory, adapters=adapter or (), host=host, port=port, api_key=api_key, slots=slots, queue=queue,
        context=context, time_limit=_seconds(time_limit, "--time-limit"), max_body=max_body, dtype=dtype,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, for its knobs.")] = None,
    as_json: Json = False,
    help_all: HelpAll = False,
) -> None:
    """List the methods; with NAME, its knobs, needs and paper."""
    from slimwright.methods.describe import describe, describe_all, print_method, print_methods

    if name is None:
        typer.echo(json.dumps(describe_all())) if as_json else print_methods(Console())
    else:
        typer.echo(json.dumps(describe(name))) if as_json else print_method(Console(), name)


@app.command()
def doctor(as_json: Json = False, help_all: HelpAll = False) -> None:
    """Say what this machine has: versions tested against, kernels, threads, disk, what is missing."""
    from slimwright.job.doctor import examine, print_examination

    found = examine()
    typer.echo(json.dumps(found)) if as_json else print_examination(Console(), found)


@cache_app.command("ls")
def cache_ls(as_json: Json = False) -> None:
    """List what is cached."""
    from slimwright.directories import cache_directory
    from slimwright.job.cache import entries

    found = entries()
    if as_json:
        typer.echo(json.dumps({"directory": str(cache_directory()), "entries": found}))
        return
    console = Console()
    console.print(f"{cache_directory()}: {sum(e['bytes'] for e in found) / 1e6:.1f} MB", highlight=False)
    for entry in found:
        line = f"  {entry['bytes'] / 1e6:9.1f} MB  {entry['name']}  {entry.get('what', '')}".rstrip()
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@cache_app.command("rm")
def cache_rm(
    names: Annotated[list[str] | None, typer.Argument(help="Entries to remove; all if none is named.")] = None,
) -> None:
    """Remove cached entries."""
    from slimwright.job.cache import remove

    freed = remove(names or None)
    Console().print(f"Removed {freed / 1e6:.1f} MB.", highlight=False)


def _not_built(verb: str) -> Callable[..., None]:
    def command(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
        raise NotBuiltError(f"`slimwright {verb}` is designed but not built in this version.")

    command.__doc__ = "Not built in this version."
    return command


for _verb in ("tune",):
    app.command(
        _verb, hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
    )(_not_built(_verb))  # fmt: skip


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _seconds(text: str, option: str = "--job-time") -> float:
    """``600``, ``10m``, ``2h`` → seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    unit = units.get(text[-1:].lower())
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise InputError(f"{option} '{text}' is not a time such as 600, 10m or 2h.") from None


def _print_forecast(console: Console, data: dict[str, Any]) -> None:
    found = data["forecast"]
    exact = "exactly" if found["bytes_exact"] else "99 to 100 % of"
    lines = [
        f"{data['model']['path']}: {data['model']['family']}, {data['model']['parameters']:,} parameters",
        f"size    {data['size']['before'] / 1e6:.1f} MB → {exact} {found['bytes'] / 1e6:.3f} MB",
        f"memory  {found['peak_memory_bytes'] / 1e6:.0f} MB (at least {found['least_memory_bytes'] / 1e6:.0f} MB)",
        f"disk    {found['disk_bytes'] / 1e6:.1f} MB, scratch included",
        f"time    about {found['seconds']:.0f} s: "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["phases"].items()),
        *([f"search  evaluates up to {found['evaluations']:,} models"] if found.get("evaluations") else []),
        *(f"Note: {note}" for note in data["notes"]),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_merge(console: Console, data: dict[str, Any], out: object) -> None:
    found, size, tensors = data["forecast"], data["size"], data["tensors"]
    whose = "mergekit's definitions and defaults" if data["definitions"] == "mergekit" else "the paper's definitions"
    lines = [f"method  {data['method']} ({whose}): {'; '.join(data['specs'][:3])}{' ...' if data['specs'][3:] else ''}"]
    if data["differs_from_the_paper"]:
        lines.append(f"        unlike the paper: {data['differs_from_the_paper']}")
    lines += [
        f"models  {', '.join(data['models'])}; base {data['base'] or 'none'}",
        f"tensors {tensors['merged']} merged, {tensors['copied']} copied, {tensors['not_read']} of the inputs not read",
        f"size    {size['before'] / 1e6:.1f} MB -> {size['after'] / 1e6:.1f} MB in {size['shards']} file(s)",
    ]
    if data.get("dry_run"):
        lines += [
            f"reads   {found['read_bytes'] / 1e6:.1f} MB",
            f"memory  {found['memory_bytes'] / 1e6:.0f} MB",
            f"time    about {found['seconds']:.1f} s",
        ]
    else:
        job, proof = data.get("job"), data.get("verified")
        if job:
            lines.append(f"took    {job['seconds']:.1f} s, {job['peak_memory_bytes'] / 1e6:.0f} MB of memory")
        if proof and proof["ok"]:
            lines.append(f"proof   {proof['tensors']} tensors and {proof['tiles']} random tiles equal")
    lines += [f"Note: {note}" for note in data["notes"]]
    if out is not None:
        lines += [f"Report: {out}/report.html"] + (
            [f"Load it with:\n{data['how_to_load']}"] if "how_to_load" in data else []
        )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _on_terminate(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point: runs a command and exits with its code; errors become one sentence on stderr."""
    given = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _on_terminate)
    if hasattr(os, "register_at_fork"):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(given, standalone_mode=False) or 0
        if code == INTERRUPTED:  # Typer makes an exit code of Ctrl-C and says nothing
            raise KeyboardInterrupt
        sys.stdout.flush()
    except SlimwrightError as error:
        _fail(str(error), error.exit_code)
    except typer.Abort:
        _fail("Interrupted.", INTERRUPTED)
    except KeyboardInterrupt:
        command = shlex.join(["slimwright", *given])
        _fail(f"Interrupted; what is finished is kept. Continue with:\n{command}", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is not None:  # click's own errors: unknown option, missing argument
            _fail(f"{usage()} See `slimwright --help`.", 2)
        _fail(_unexpected(error), 1)
    sys.exit(code if isinstance(code, int) else 0)


def _unexpected(error: Exception) -> str:
    """A failure that no check foresaw: the sentence, and where the traceback is."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="slimwright-", suffix=".log", delete=False) as file:
        traceback.print_exception(error, file=file)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"Unexpected {type(error).__name__}: {first} (details in {file.name}; please report it)"


def _fail(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(f"slimwright: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
