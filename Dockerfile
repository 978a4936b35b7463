# Python 3.11 on Debian 12: the newest Python that every pinned wheel supports.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

WORKDIR /workspace

# The user comes first, the layer that takes minutes next, the code last: a change of code rebuilds
# in seconds. Its numbers are nobody's: whoever passes `--user` must not turn out to be it (1000
# would be most desktops' first user).
RUN groupadd --gid 64646 segmenter \
    && useradd --uid 64646 --gid segmenter --key UID_MAX=64646 --no-create-home \
        --home-dir /workspace segmenter \
    && mkdir inputs outputs \
    && chown segmenter:segmenter outputs

# cuda: the package index's own torch, for NVIDIA GPUs and CPUs alike. cpu: far smaller, CPUs only.
ARG TORCH=cuda
# Asked for the cpu build only where pip's own sources have none.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.txt ./
# SimpleITK stays out: converting medical image files is done outside (see .dockerignore).
# What only builds or tests the packages goes before the layer is written.
RUN set -eu; \
    sed '/^SimpleITK==/d' requirements.txt > /tmp/requirements.txt; \
    install() { pip install --no-cache-dir --root-user-action=ignore "$@" -r /tmp/requirements.txt; }; \
    case "$TORCH" in \
        cuda) install ;; \
        cpu) sed -i 's/^torch==[^ +]*/&+cpu/' /tmp/requirements.txt; \
            install || install --extra-index-url "$TORCH_CPU_INDEX" ;; \
        *) echo "TORCH=$TORCH; accepted: cuda or cpu" >&2; exit 2 ;; \
    esac; \
    rm /tmp/requirements.txt; \
    cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
    rm -rf torch/test torch/include torch/share torch/lib/lib*_test.so; \
    find torch/bin -type f ! -name torch_shm_manager -delete; \
    find . -depth -type d -name tests -exec rm -rf {} +; \
    find . -type f \( -name '*.a' -o -name '*.h' -o -name '*.hpp' -o -name '*.pyi' \) -delete

COPY weights/ weights/
COPY inference/ inference/
COPY predict.sh ./
# Bytecode is compiled here: the user below may not write it, and each start would pay for it again.
# Files may come from a checkout that only its owner can read.
RUN find inference weights predict.sh ! -perm -a+r -exec chmod a+rX {} + \
    && python -m compileall -q inference

# The challenge mounts folders of its own user and lets the image be whoever it is. Where they are
# closed to the user below, predict.sh runs through this copy of setpriv, which may pass on one
# capability, to open files whatever their permissions: no root, and nothing else of root's. Only
# that user may execute it, so `--user` gets what was asked for and no more.
RUN install --mode=0750 --group=segmenter "$(command -v setpriv)" /usr/local/bin/open-mounts \
    && python -c "import os, struct; os.setxattr('/usr/local/bin/open-mounts', 'security.capability', struct.pack('<5I', 0x02000000, 1 << 1, 0, 0, 0))"

ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER segmenter
# No ENTRYPOINT: the challenge runs `IMAGE /bin/bash -c "sh predict.sh"`.
CMD ["sh", "predict.sh"]

ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=
LABEL org.opencontainers.image.title="Enhanced SAM-Med3D" \
      org.opencontainers.image.description="Promptable 3D medical image segmentation" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
# A program that ends; nothing to watch.
HEALTHCHECK NONE
