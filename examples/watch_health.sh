#!/bin/sh
# Exits with 0 while the service can decide, and with 1 otherwise; prints why.
FACE_API=${FACE_API:-http://127.0.0.1:5000}
if answer=$(curl -sS --fail-with-body --max-time 5 "$FACE_API/health"); then
    echo "$answer"
else
    echo "${answer:-no answer}"
    exit 1
fi
