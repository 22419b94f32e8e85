#!/bin/sh
# Makes the one-member replica set, and the service's user, who may read and write only its own database. Safe to repeat.
set -eu
root=$(cat /run/secrets/mongo_root_password)
app=$(cat /run/secrets/mongo_app_password)
ROOT_PASSWORD=$root APP_PASSWORD=$app exec mongosh --quiet --host mongo --eval '
    const admin = db.getSiblingDB("admin");
    admin.auth("root", process.env.ROOT_PASSWORD);
    try {
        rs.initiate({_id: "rs0", members: [{_id: 0, host: "mongo:27017"}]});
    } catch (error) {
        if (error.codeName !== "AlreadyInitialized") throw error;
    }
    while (!db.hello().isWritablePrimary) sleep(200);
    const faces = db.getSiblingDB("face_recognition");
    const roles = [{role: "readWrite", db: "face_recognition"}];
    if (faces.getUser("face-api")) faces.updateUser("face-api", {pwd: process.env.APP_PASSWORD, roles});
    else faces.createUser({user: "face-api", pwd: process.env.APP_PASSWORD, roles});
'
