FROM python:3.11.15-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends busybox prometheus && ln -s /usr/bin/busybox /usr/local/bin/wget
RUN mkdir -p /prometheus /etc/prometheus && chown 65534:65534 /prometheus
USER 65534
WORKDIR /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
