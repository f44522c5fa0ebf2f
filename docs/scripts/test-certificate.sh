#!/usr/bin/env bash
# Makes test.pem and test.key in the current folder, which sign content credentials for a trial. Nobody trusts them: programs
# show such images as signed by an unknown signer. A certificate to publish with comes from an authority on C2PA's trust list.
set -euo pipefail
openssl ecparam -name prime256v1 -genkey -noout -out test-ca.key
openssl req -x509 -new -key test-ca.key -subj "/CN=Test authority/O=Test" -days 365 -out test-ca.pem \
    -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign
openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:prime256v1 -out test.key
openssl req -new -key test.key -subj "/CN=Test signer/O=Test" -out test.csr
openssl x509 -req -in test.csr -CA test-ca.pem -CAkey test-ca.key -CAcreateserial -days 365 -out test.pem -extfile <(
    echo "basicConstraints=critical,CA:FALSE"
    echo "keyUsage=critical,digitalSignature"
    echo "extendedKeyUsage=emailProtection"
    echo "authorityKeyIdentifier=keyid"
)
cat test-ca.pem >> test.pem
rm test.csr test-ca.key test-ca.pem test-ca.srl
