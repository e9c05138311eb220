# repirl on NVIDIA GPUs. In the root of a clone, with BuildKit (the default of Docker 23 and newer):
#
#     docker build --file docker/cuda.Dockerfile --tag repirl:cuda .
#     docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" --volume "$PWD:/data" repirl:cuda \
#         train --config my.yaml
#
# On several GPUs: --entrypoint torchrun ... repirl:cuda --nproc-per-node 8 -m repirl.cli train --config my.yaml, where
# --ipc host is for the shared memory of NCCL. The host gives its driver (NVIDIA Container Toolkit); CUDA's libraries come
# with PyTorch. The container works in /data, which is also its home: models of the hub and compiled Triton kernels are
# kept in /data/.cache and /data/.triton.

FROM python:3.12-slim-bookworm AS base
# The compiler is for the C++ kernels; later on Triton compiles a C file for each kernel that it starts, and torch.compile
# (policy.compile) C++. Debian keeps no old versions, so none is asked for.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
WORKDIR /source
COPY . .
# A wheel without the C++ kernels works, slower on CPUs: here it ends the build.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && ! ls /wheels/*without_cpp_kernels*

FROM base
# Before repirl, so that a change of repirl does not ask for PyTorch and CUDA again.
RUN pip install --no-cache-dir "torch>=2.11,<2.14"
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/repirl-*.whl)[train]" \
    && python -c "from repirl_kernels.native import is_available; assert is_available()" \
    && repirl --version
# Whoever runs it, also with --user, may write there, and has the name that PyTorch asks for.
RUN mkdir --mode=1777 /data
ENV HOME=/data USER=repirl NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /data
USER 1000
ENTRYPOINT ["repirl"]
CMD ["--help"]
