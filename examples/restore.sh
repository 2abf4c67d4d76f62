#!/usr/bin/env bash
# Restores a backup that `flowpp backup` made, on a machine that has nothing of the service yet.
#
#     examples/restore.sh BACKUP [DATA]
#
# BACKUP is a directory or s3://bucket/folder; DATA the data directory of `flowpp serve` ("data" where it is left out),
# whose store and Redis server are made anew. A service with a store or a Redis server of its own has FLOWPP_STORE and
# FLOWPP_REDIS_URL in the environment, which then name the new and empty ones.
set -euo pipefail

backup=${1:?"usage: restore.sh BACKUP [DATA]"}
data=${2:-data}
store=${FLOWPP_STORE:-$data/store}

if [ -z "${FLOWPP_STORE:-}" ] && [ -e "$store" ]; then
    echo "restore.sh: $store is there already; restore into a new data directory" >&2
    exit 2
fi
mkdir -p "$data"
echo "restoring the store from $backup, each file verified" >&2
if ! FLOWPP_STORE=$backup flowpp backup "$store" --data "$data"; then
    echo "restore.sh: not all was restored; to go on without the rest: flowpp reindex --data $data" >&2
    exit 1
fi
echo "rebuilding Redis from it" >&2
flowpp reindex --data "$data"
