# Python 3.11 on Debian 12: the newest Python that every pinned wheel supports.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="Enhanced SAM-Med3D" \
      org.opencontainers.image.description="Promptable 3D medical image segmentation" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /workspace

# The layer that takes minutes comes first, so that a change of code rebuilds in seconds.
COPY requirements.txt ./
RUN pip install --no-cache-dir --compile -r requirements.txt

COPY weights/ weights/
COPY inference/ inference/
COPY predict.sh ./

# Bytecode is compiled here: the user below may not write it, and each start would pay for it again.
RUN python -m compileall -q inference \
    && useradd --uid 1000 --create-home segmenter \
    && mkdir inputs outputs \
    && chown segmenter outputs
USER segmenter

# No ENTRYPOINT: the challenge runs `IMAGE /bin/bash -c "sh predict.sh"`.
CMD ["sh", "predict.sh"]
