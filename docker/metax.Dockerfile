# The checkout with its environment, for MetaX GPUs. From the root of the checkout:
#   docker build --file docker/metax.Dockerfile --build-arg BASE=<an image with torch for MACA> \
#       --tag spikingbrain-train:metax .
#   docker run --rm --device /dev/dri --device /dev/mxcd --group-add video --shm-size 16g spikingbrain-train:metax make demo
# BASE has no default: which image fits is a matter of the driver (docs/guides/containers.md).
ARG BASE
FROM $BASE

ARG USER_ID=1000
# The image's interpreter, which has torch for MACA.
ARG PYTHON=/opt/conda/bin/python
# The image's own fla is taken where it has one; more names here are built against its torch.
ARG KERNELS=
# SYSTEM_TORCH: the torch of the image stays, and all that is built against it.
ENV VENV=/opt/spikingbrain SYSTEM_TORCH=yes PIP_NO_CACHE_DIR=1
ENV PATH=$VENV/bin:$PATH

USER 0
WORKDIR /workspace/spikingbrain-train
COPY docker/install.sh docker/
RUN docker/install.sh system git make \
    && docker/install.sh user "$USER_ID" "$PWD" "$VENV"
USER $USER_ID

# What decides the environment comes first, so that a change of the code installs nothing anew.
COPY --chown=$USER_ID pyproject.toml README.md LICENSE ./
COPY --chown=$USER_ID constraints constraints/
COPY --chown=$USER_ID scripts/setup_environment.sh scripts/
COPY --chown=$USER_ID spikingbrain_train/__init__.py spikingbrain_train/
# The names of packages are words.
# hadolint ignore=SC2086
RUN PYTHON=$PYTHON scripts/setup_environment.sh "$VENV" && docker/install.sh kernels $KERNELS

COPY --chown=$USER_ID . .
CMD ["make", "help"]
