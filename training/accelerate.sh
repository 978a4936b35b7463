#!/bin/sh
# From an archive of training.pack to a weights file and its figures, on one machine, in one go:
#   PYTHON=python3 sh training/accelerate.sh DATA.tar.xz OUT MINUTES [training.train's switches]
# DATA holds the folders train, label_maps and, to be judged at once, val. Two thirds of the (whole)
# MINUTES train the network that sees boxes, the rest the one that never does, both as default.yaml
# says, but in batches and at a rate for one GPU with 16 CPU cores. Start it again with the same OUT
# and it goes on where it was. OUT/weights.safetensors is the result; OUT/box and OUT/nobox hold its
# figures.
set -eu
data=$1 out=$2 minutes=$3
shift 3
python=${PYTHON:-python3}
mkdir -p "$out/data"
tar -xf "$data" -C "$out/data"

train() { # FOLDER MINUTES SHARE_WITHOUT_BOX [switches]
    folder=$out/$1 limit=$2 share=$3
    shift 3
    $python -m training.train --config training/configs/default.yaml --init default \
        --data "$out/data/train" --label-maps "$out/data/label_maps" --out "$folder" --resume \
        --set steps=1000000 "minutes=$limit" "no_box=$share" \
        batch=64 workers=20 lr=8.0e-4 warmup_steps=200 "$@"
}
boxed=$((minutes * 2 / 3))
train boxed "$boxed" 0.0 "$@"
train unboxed $((minutes - boxed)) 1.0 "$@"
$python -m training.export --checkpoint "$out/boxed/checkpoint.pt" \
    --unboxed "$out/unboxed/checkpoint.pt" --out "$out/weights.safetensors"
[ -d "$out/data/val" ] || exit 0
for boxes in "box" "nobox --no-boxes"; do
    # shellcheck disable=SC2086  # two words on purpose
    $python -m training.evaluation.evaluate --cases "$out/data/val" --force \
        --weights "$out/weights.safetensors" --out "$out/"$boxes
done
