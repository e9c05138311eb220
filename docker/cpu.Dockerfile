# repirl on CPUs. In the root of a clone, with BuildKit (the default of Docker 23 and newer):
#
#     docker build --file docker/cpu.Dockerfile --tag repirl:cpu .
#     docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/data" repirl:cpu demo
#
# The container works in /data, which is also its home: models of the hub are kept in /data/.cache.

FROM python:3.12-slim-bookworm AS base
# The compiler is for the C++ kernels, and for torch.compile (policy.compile) later on. Debian keeps no old versions, so
# none is asked for.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

FROM base AS build
WORKDIR /source
COPY . .
# A wheel without the C++ kernels works, slower: here it ends the build.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && ! ls /wheels/*without_cpp_kernels*

FROM base
# PyTorch's own index has the build for CPUs; that of PyPI brings CUDA. Before repirl, so that a change of repirl does not
# ask for it again.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.11,<2.14"
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/repirl-*.whl)[train]" \
    && python -c "from repirl_kernels.native import is_available; assert is_available()" \
    && repirl --version
# Whoever runs it, also with --user, may write there, and has the name that PyTorch asks for.
RUN mkdir --mode=1777 /data
ENV HOME=/data USER=repirl
WORKDIR /data
USER 1000
ENTRYPOINT ["repirl"]
CMD ["--help"]
