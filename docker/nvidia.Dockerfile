# The checkout with its environment, for NVIDIA GPUs. From the root of the checkout:
#   docker build --file docker/nvidia.Dockerfile --tag spikingbrain-train:nvidia .
#   docker run --rm --gpus all --shm-size 16g spikingbrain-train:nvidia make demo
# NVIDIA's image of PyTorch and not nvidia/cuda: its torch and its Transformer Engine were built for each other. One
# stage: the compilers come with that image, and Triton's kernels are compiled where it runs.
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM $BASE

ARG USER_ID=1000
# Beside what the image has. Mamba layers: "flash-linear-attention mamba-ssm", which compiles for a while.
ARG KERNELS=flash-linear-attention
# SYSTEM_TORCH: the torch of the image stays, and all that is built against it. PIP_CONSTRAINT: the image pins the
# packages that it was made with; what must not change of them, SYSTEM_TORCH keeps.
ENV VENV=/opt/spikingbrain SYSTEM_TORCH=yes PIP_CONSTRAINT= PIP_NO_CACHE_DIR=1
ENV PATH=$VENV/bin:$PATH

WORKDIR /workspace/spikingbrain-train
COPY docker/install.sh docker/
RUN docker/install.sh system git make python3-venv \
    && docker/install.sh user "$USER_ID" "$PWD" "$VENV"
USER $USER_ID

# What decides the environment comes first, so that a change of the code installs nothing anew.
COPY --chown=$USER_ID pyproject.toml README.md LICENSE ./
COPY --chown=$USER_ID constraints constraints/
COPY --chown=$USER_ID scripts/setup_environment.sh scripts/
COPY --chown=$USER_ID spikingbrain_train/__init__.py spikingbrain_train/
# The names of packages are words.
# hadolint ignore=SC2086
RUN scripts/setup_environment.sh "$VENV" && docker/install.sh kernels $KERNELS

COPY --chown=$USER_ID . .
CMD ["make", "help"]
