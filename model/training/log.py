"""What a training run tells: a line of JSON for each step, a progress bar, a chart."""

import json

from tqdm import tqdm

from model.checkpoints.atomic import write_file

LOG, CHART = "log.jsonl", "loss.png"


class Log:
    """DIR/log.jsonl, which on resuming loses what was said of the steps that are to be done again."""

    def __init__(self, directory, step):
        self.path, self.rows = directory / LOG, []
        if self.path.exists():
            self.rows = [row for row in read_log(self.path) if row["step"] <= step]
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.file = self.path.open("a", encoding="utf-8")

    def add(self, **row):
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def draw(self):
        """DIR/loss.png: training and validation loss by step."""
        draw(self.rows, self.path.with_name(CHART))

    def close(self):
        self.file.close()


def read_log(path):
    """The rows of a log; a last line that was cut off while it was written is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path} is no log of training: {line[:60]!r} names no step")
        rows.append(row)
    return rows


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for name, label, style in (
        ("loss", "training", {"lw": 0.8, "color": "#4477aa"}),
        ("val_loss", "validation", {"lw": 1.5, "color": "#cc3311", "marker": "o", "ms": 3}),
    ):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axis.plot(*zip(*points), label=label, **style)
    axis.set(xlabel="step", ylabel="loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, bbox_inches="tight", format="png")
    pyplot.close(figure)
    temporary.replace(path)


def bar(steps, done, shown):
    return tqdm(total=steps, initial=done, desc="training", unit="step", disable=None if shown else True)
