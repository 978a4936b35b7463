#!/bin/sh
# Segments every case of a folder: sh predict.sh [--inputs DIR] [--outputs DIR] ...
# Works from any folder: the code is found beside this file, relative arguments are the caller's.
# PYTHON names the interpreter; without it the checkout's own .venv is used where there is one.
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P) || exit 2
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ ! -x "$here/.venv/bin/python" ] || PYTHON="$here/.venv/bin/python"
fi
# -P: a file of the caller's folder named like one of our modules must not be imported instead.
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -P -m inference.predict "$@"
