"""The report of a visit, and how all of it is packed: at most eight files, of which README.md comes first."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

from bench.lib import published
from bench.lib.files import write_file
from bench.lib.record import cell

OK = "ok"
REST, STAGES = "everything.tar.gz", "stages.json"
CHARTS = 4  # with README.md, results.json, the archive and one that is being written: eight
# The first charts, by worth; others follow in the archive.
FIRST = ("attention_packed", "attention_speedup", "attention_throughput", "transformers_speedup", "pointwise_bandwidth")
NOT_SHOWN = (".", "attention_error", "roofline")  # bench/plots.py draws these from what is packed; one is half written
LARGEST = 16 * 2**20
LONGEST_LOG = 2**18

# What a row of a table is told by, for each kind of rows; its first field tells the kind.
FIELDS = (
    ("scenario", "mode", "dtype", "B", "H", "T", "T_k", "D", "padding", "valid", "dropout_p"),
    ("op", "mode", "dtype", "M", "N"),
    ("case", "size", "dtype"),
    ("mode", "size", "dtype", "B", "T"),
)
ALWAYS = {"mode", "T", "op", "case"}  # columns that stay where all rows agree


def write(work, out, environment, outcomes):
    """Writes the report on what lies in `work` and packs it into `out`."""
    results = {str(path.relative_to(work)): load(path) for path in sorted(work.glob("*/*.json"))}
    results = {name: data for name, data in results.items() if data}
    tests = [entry for path in sorted(work.glob("*/tests.jsonl")) for entry in lines_of(path)]
    charts = charts_of(work)
    write_file(out / "README.md", text(environment, outcomes, results, tests, [path.name for path in charts]))
    stages = json.loads((work / STAGES).read_text(encoding="utf-8")) if (work / STAGES).exists() else {}
    write_file(out / "results.json", json.dumps(stages | {"results": results, "tests": tests}) + "\n")
    for path in charts:
        write_file(out / path.name, path.read_bytes())
    for stale in {path.name for path in work.glob("*/*.png")} - {path.name for path in charts}:
        (out / stale).unlink(missing_ok=True)  # one of the first while less was known
    pack(work, out / REST)


def load(path):
    """The data of a bench's file, or None while it is not there whole."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and isinstance(data.get("rows"), list) else None


def lines_of(path):
    """The entries of the tests' file, without a last line that is being written."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def charts_of(work):
    """The first charts, one of a name, by worth."""
    found = {}
    for path in sorted(work.glob("*/*.png"), key=lambda path: path.parent.name != "lengths"):
        if not path.name.startswith(NOT_SHOWN):
            found.setdefault(path.name, path)

    def worth(name):
        return next((i for i, first in enumerate(FIRST) if name.startswith(first)), len(FIRST)), name

    return [found[name] for name in sorted(found, key=worth)][:CHARTS]


def pack(work, path):
    """Packs `work` into one archive of at most LARGEST bytes; logs are cut in their middle."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as archive:
        for file in sorted(path for path in work.rglob("*") if path.is_file() and not path.name.startswith(".")):
            data = file.read_bytes()
            if file.suffix == ".txt" and len(data) > LONGEST_LOG:
                data = data[: LONGEST_LOG // 4] + b"\n...\n" + data[-LONGEST_LOG:]
            member = tarfile.TarInfo(str(file.relative_to(work)))
            member.size, member.mtime = len(data), int(file.stat().st_mtime)
            archive.addfile(member, io.BytesIO(data))
    if packed.tell() > LARGEST:
        raise ValueError(f"{path}: more than {LARGEST} bytes")
    write_file(path, packed.getvalue())


def unpack(out, work):
    """Unpacks what pack() made. ValueError if it did not."""
    try:
        with tarfile.open(out / REST, "r:gz") as archive:
            archive.extractall(work, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ValueError(f"{REST}: {str(error).splitlines()[0]}") from None


# README.md


def text(environment, outcomes, results, tests, charts):
    parts = [head(environment), stages(outcomes, results, tests), failures(results, tests)]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in charts]
    parts += [comparison(results), tuning(results), ceilings(results)]
    parts += [tables(name, data) for name, data in results.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def head(environment):
    e = environment
    commit = (
        f"commit {e['commit'][:12]}{' with changes' if e.get('dirty') else ''}" if e.get("commit") else "commit unknown"
    )
    return (
        f"# {e['device']}\n\n{e['date']}, `{e['command']}`; {commit}, sources {e['sources']}; torch {e['torch']}, "
        f"triton {e['triton']}, CUDA {e['cuda']}, driver {e['driver']}, Python {e['python']}, {e['cpu']}, "
        f"{e['cores']} cores, load {e['load']} before."
    )


def markdown(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(c).replace("|", "/") for c in row) + " |" for row in rows])


def stages(outcomes, results, tests):
    """What became of each stage."""
    rows = []
    for outcome in outcomes.values():
        statuses = Counter()
        for name, data in results.items():
            if name.split("/")[0] == outcome.name:
                statuses.update(kind(row["status"]) for row in data["rows"])
                statuses.update({"cases without rows": len(data.get("failed", ()))})
        if outcome.name == "tests":
            statuses.update(entry["outcome"] for entry in tests)
        counts = ", ".join(f"{n} {status}" for status, n in statuses.most_common() if n)
        rows.append((outcome.name, outcome.what, outcome.status, f"{outcome.seconds:.0f}", counts or "-"))
    return markdown(("stage", "what", "status", "seconds", "rows or tests"), rows)


def kind(status):
    """A status without its particulars."""
    return status.split(":")[0].strip()


def failures(results, tests):
    """What failed, in its words."""
    lines = []
    for entry in tests:
        if entry["outcome"] in ("failed", "not collected"):
            last = (entry.get("report") or "").strip().splitlines()[-1:] or ["no report"]
            reasons = [line for line in (entry.get("report") or "").splitlines() if line.startswith("E ")] or last
            lines.append(f"- `{entry['nodeid']}`: {reasons[0].removeprefix('E').strip()[:200]}")
    for name, data in results.items():
        seen = Counter()
        for row in data["rows"]:
            if kind(row["status"]) in ("failed", "error"):
                who = next((row[key] for key in ("backend", "provider", "tokenizer", "what") if key in row), "")
                seen[f"{who}, {row.get('op') or row.get('mode', '')}: {row['status'][:200]}"] += 1
            elif row.get("graph_note"):
                seen[f"{row.get('backend') or row.get('provider') or ''}: {row['graph_note'][:200]}"] += 1
        lines += [f"- {name}: {words}{f' ({n} rows)' if n > 1 else ''}" for words, n in seen.items()]
        lines += [f"- {name}: {case} gave no rows: {status}" for case, status in data.get("failed", ())]
    return "## What failed\n\n" + ("\n".join(lines) or "Nothing.")


def comparison(results):
    """Attention over sequence lengths beside what others have published."""
    parts, sources = [], list(dict.fromkeys(p.source for p in published.ATTENTION))
    for stage in ("published", "lengths"):
        mine = [
            row
            for name, data in results.items()
            if name.startswith(f"{stage}/")
            for row in data["rows"]
            if row.get("scenario") == "lengths" and row["tflops"]
        ]
        for mode, D, causal in dict.fromkeys((row["mode"], row["D"], row["causal"]) for row in mine):
            theirs = [p for p in published.ATTENTION if (p.mode, p.D, p.causal) == (mode, D, causal)]
            ours = {}
            for row in mine:
                if (row["mode"], row["D"], row["causal"]) == (mode, D, causal):
                    ours.setdefault(f"{row['backend']}, here (H = {row['H']}, {row['dtype']})", {})[row["T"]] = row[
                        "tflops"
                    ]
            lengths = sorted({T for figures in (*ours.values(), *(p.tflops for p in theirs)) for T in figures})
            rows = [(name, *(cell(known.get(T, "-")) for T in lengths)) for name, known in ours.items()]
            rows += [
                (f"{p.name}, {p.gpu} [{1 + sources.index(p.source)}]", *(p.tflops.get(T, "-") for T in lengths))
                for p in theirs
            ]
            title = f"{mode}, D = {D}, {'causal' if causal else 'full'}, TFLOP/s over T"
            parts.append(f"### {title}\n\n" + markdown(("", *map(str, lengths)), rows))
    if not parts:
        return ""
    listed = "\n".join(f"{n}. {source}" for n, source in enumerate(sources, 1))
    return (
        "## Beside published figures\n\n"
        + "\n\n".join(parts)
        + f"\n\nNumbered: published, with B T = 16k, H D = 2048, fp16, on its authors' machine.\n\n{listed}"
    )


def tuning(results):
    """What was chosen for each row of the table of tile shapes, and what became of the others."""
    groups = {}
    for name, data in results.items():
        for row in data["rows"] if name.startswith("tune/") else ():
            groups.setdefault((row["direction"], row["dtype"], row["D"]), []).append(row)
    if not groups:
        return ""
    lines = []
    for (direction, dtype, D), rows in groups.items():
        chosen = next((row for row in rows if row["chosen"]), None)
        tile = [chosen[key] for key in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")] if chosen else "-"
        counts = Counter(kind(row["status"]) for row in rows)
        lines.append(
            (direction, f"{dtype}, D = {D}", tile, cell(chosen["median_ms"]) if chosen else "-")
            + (", ".join(f"{n} {status}" for status, n in counts.most_common()),)
        )
    return "## Tuning\n\n" + markdown(("direction", "of", "chosen", "median ms", "candidates"), lines)


def ceilings(results):
    rows = [row for name, data in results.items() if name.startswith("ceilings/") for row in data["rows"]]
    if not rows:
        return ""
    here = [(f"{r['what']}, {r['dtype']}, {r['size']}", cell(r["value"]), r["unit"], "here") for r in rows]
    theirs = [(f.what, f"{f.value:g}", f.unit, f"{f.gpu}: {f.source}") for f in published.OTHERS]
    return "## Ceilings\n\n" + markdown(("what", "value", "unit", "where"), here + theirs)


def tables(name, data):
    """The rows of one file: providers side by side, their median, and what else there is of it."""
    rows = data["rows"]
    series = next((key for key in ("backend", "provider") if rows and key in rows[0]), None)
    if series is None:
        return ""
    fields = next(fields for fields in FIELDS if fields[0] in rows[0])
    fields = [f for f in fields if f in ALWAYS & rows[0].keys() or len({row.get(f) for row in rows}) > 1]
    names = list(dict.fromkeys(row[series] for row in rows))
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row.get(field) for field in fields), {})[row[series]] = row
    lines = [
        (*(cell(value) if value is not None else "" for value in key), *(summary(group.get(n)) for n in names))
        for key, group in groups.items()
    ]
    same = ", ".join(
        f"{key} {rows[0][key]}" for key in ("size", "dtype", "H", "D") if key in rows[0] and key not in fields
    )
    unit = "median ms (TFLOP/s, or share of a copy, or tokens/s)"
    return f"## {name}\n\n{same}; {unit}\n\n" + markdown((*fields, *names), lines)


def summary(row):
    """A row in one cell."""
    if row is None:
        return "-"
    if row.get("median_ms") is None:
        return kind(row["status"])
    more = [(row.get("tflops"), "{:.0f}"), (row.get("of_copy"), "{:.0%}"), (row.get("tokens_per_s"), "{:.0f}/s")]
    rate = next((pattern.format(value) for value, pattern in more if value), None)
    return cell(row["median_ms"]) + (f" ({rate})" if rate else "")
