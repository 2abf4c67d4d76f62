# The HTTP service and the `flowpp` command: no torch, no compiler. From the repository's root:
#     docker build --file docker/api.Dockerfile --tag flowpp-api:local .
FROM python:3.11.15-slim-bookworm AS build
WORKDIR /build
COPY requirements-service.txt ./
RUN python -m venv /opt/flowpp
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/flowpp/bin/python -m pip install --require-hashes -r requirements-service.txt
COPY pyproject.toml README.md ./
COPY flowpp ./flowpp
COPY worker ./worker
COPY api ./api
RUN /opt/flowpp/bin/python -m pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11.15-slim-bookworm
RUN groupadd --gid 10001 flowpp \
    && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin flowpp \
    && mkdir -p /data \
    && chown 10001:10001 /data
COPY --from=build /opt/flowpp /opt/flowpp
ENV PATH=/opt/flowpp/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/data
ENV FLOWPP_DATA_DIRECTORY=/data FLOWPP_METRICS_PORT=9100
WORKDIR /data
USER 10001:10001
EXPOSE 8000 9100
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as http; http.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
CMD ["uvicorn", "api.app:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000", "--timeout-graceful-shutdown", "5", "--no-server-header"]
