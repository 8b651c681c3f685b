#!/usr/bin/env python3
"""Runs a notebook's cells in order in one interpreter, without Jupyter, and keeps what they print.

python examples/run_notebook.py examples/attach.ipynb
"""

import contextlib
import io
import json
import pathlib
import sys


def run(path: pathlib.Path) -> dict:
    """The notebook with the outputs of this run. A cell that fails raises its own error."""
    notebook = json.loads(path.read_text())
    names = {"__name__": "__main__"}
    for count, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{path.name}, cell {count}", "exec"), names)
        text = printed.getvalue()
        output = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell["execution_count"], cell["outputs"] = count, [output] if text else []
    return notebook


if __name__ == "__main__":
    target = pathlib.Path(sys.argv[1])
    target.write_text(json.dumps(run(target), indent=1, ensure_ascii=False) + "\n")
