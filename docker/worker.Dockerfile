# A worker, training or inference, with torch for the CPU or for CUDA by TORCH_INDEX. From the repository's root:
#     docker build --file docker/worker.Dockerfile --build-arg TORCH_INDEX=... --tag flowpp-worker:local .
# A container compiles the CPU kernels for its processor's level when it first computes, into the volume /cache: the image
# has a compiler for that. Docker mounts /tmp without the right to execute.
FROM python:3.11.15-slim-bookworm AS build
WORKDIR /build
COPY requirements-service.txt requirements-torch.txt ./
RUN python -m venv /opt/flowpp
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/flowpp/bin/python -m pip install --require-hashes -r requirements-service.txt
# A package index for one build of torch; empty is pip's own, whose build for x86-64 is for CUDA.
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/flowpp/bin/python -m pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r requirements-torch.txt
COPY pyproject.toml README.md ./
COPY flowpp ./flowpp
COPY worker ./worker
COPY api ./api
RUN /opt/flowpp/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11.15-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 flowpp \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin flowpp \
    && mkdir -p /data /cache \
    && chown 10001:10001 /data /cache
COPY --from=build /opt/flowpp /opt/flowpp
ENV PATH=/opt/flowpp/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENV HOME=/cache XDG_CACHE_HOME=/cache TORCHINDUCTOR_CACHE_DIR=/cache/inductor
ENV FLOWPP_DATA_DIRECTORY=/data FLOWPP_METRICS_PORT=9100
WORKDIR /data
USER 10001:10001
EXPOSE 9100
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as http; http.urlopen('http://127.0.0.1:9100/metrics', timeout=5)"]
CMD ["python", "-m", "worker", "training"]
