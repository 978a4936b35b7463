#!/bin/sh
# Segments every case of a folder: sh predict.sh [--inputs DIR] [--outputs DIR] ...
# Works from any folder: the code is found beside this file, relative arguments are the caller's.
# PYTHON names the interpreter; without it the checkout's own .venv is used where there is one.
file=$(readlink -f -- "$0") 2>/dev/null || file=$0 # a link to it may lie elsewhere
here=$(CDPATH='' cd -- "$(dirname -- "$file")" && pwd -P) || exit 2
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    command -v python >/dev/null || PYTHON=python3
    [ ! -x "$here/.venv/bin/python" ] || PYTHON="$here/.venv/bin/python"
fi
found=$(command -v -- "$PYTHON")
if [ ! -f "$found" ] || [ ! -x "$found" ]; then
    printf '%s\n' "error: $PYTHON cannot be run; accepted: PYTHON=FILE, a Python 3.11 or later" >&2
    exit 2
fi
# In the image, and there only where a mounted folder is closed to its user: the one capability
# that opens it, if the engine grants it (Dockerfile, open-mounts).
open=/usr/local/bin/open-mounts
caps='--inh-caps=+dac_override --ambient-caps=+dac_override'
closed=
if [ -x "$open" ]; then
    for place in /workspace/inputs /workspace/inputs/*.npz; do
        [ -r "$place" ] || [ ! -e "$place" ] || closed=yes
    done
    [ -x /workspace/inputs ] && [ -w /workspace/outputs ] && [ -x /workspace/outputs ] || closed=yes
fi
if [ "$closed" ] && "$open" $caps true 2>/dev/null; then
    set -- "$open" $caps -- "$PYTHON" -P -m inference.predict "$@"
else
    set -- "$PYTHON" -P -m inference.predict "$@"
fi
# Threads that wait sleep: where others keep a core busy, spinning ones made a case take 16 times as
# long, and on idle cores it gained nothing (both measured).
OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export OMP_WAIT_POLICY
# -P: a file of the caller's folder named like one of our modules must not be imported instead.
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$@"
