#!/bin/sh
# Makes the passwords and encryption keys for compose.yaml, in secrets/. Files that exist are not changed.
set -eu
umask 077
cd "$(dirname "$0")"
mkdir -p secrets
cd secrets
random() { head -c "$1" /dev/urandom | base64 | tr -d '\n'; }
[ -s mongo_root_password ] || random 24 | tr '+/' '-_' > mongo_root_password
[ -s mongo_app_password ] || random 24 | tr '+/' '-_' > mongo_app_password
[ -s mongo_keyfile ] || random 512 > mongo_keyfile
[ -s template_keys ] || random 32 > template_keys
[ -s mongo_uri ] || printf 'mongodb://face-api:%s@mongo:27017/face_recognition?replicaSet=rs0' \
    "$(cat mongo_app_password)" > mongo_uri
# The folder's mode keeps other users out. The containers' own users must read the files, which are mounted one by one.
chmod 0444 ./*
echo "secrets/ is complete. Keep a copy of template_keys elsewhere: without it no enrolled person can be read."
