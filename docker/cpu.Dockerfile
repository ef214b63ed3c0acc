# The checkout with its environment, for CPUs. From the root of the checkout:
#   docker build --file docker/cpu.Dockerfile --tag spikingbrain-train:cpu .
#   docker run --rm spikingbrain-train:cpu make demo
# Debian's Python 3.11 is the one that CI takes. One stage: nothing is compiled, so there is nothing to leave behind.
FROM debian:bookworm-slim

# Builds of torch without CUDA libraries, which are most of an image that has them. Empty: PyPI alone.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# Who runs in the container: the owner of the folders that are mounted into it.
ARG USER_ID=1000
ENV VENV=/opt/venv PIP_NO_CACHE_DIR=1
ENV PATH=$VENV/bin:$PATH

WORKDIR /workspace/spikingbrain-train
COPY docker/install.sh docker/
RUN docker/install.sh system ca-certificates git make python3 python3-venv \
    && docker/install.sh user "$USER_ID" "$PWD" "$VENV"
USER $USER_ID

# What decides the environment comes first, so that a change of the code installs nothing anew.
COPY --chown=$USER_ID pyproject.toml README.md LICENSE ./
COPY --chown=$USER_ID constraints constraints/
COPY --chown=$USER_ID scripts/setup_environment.sh scripts/
COPY --chown=$USER_ID spikingbrain_train/__init__.py spikingbrain_train/
RUN scripts/setup_environment.sh "$VENV"

COPY --chown=$USER_ID . .
CMD ["make", "help"]
