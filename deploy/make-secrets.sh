#!/bin/sh
# Makes the passwords and keys that compose.yaml names, in secrets/; those that are there stay as they are.
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
# The folder keeps others out; the files are read by the containers' own users, to whom they are mounted one by one.
chmod 0444 ./*
echo "secrets/ is complete. Keep a copy of template_keys elsewhere: without it nobody enrolled can be read."
