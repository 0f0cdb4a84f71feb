#!/bin/sh
# Fetch one published version from any web server that serves the folder tree, without our client.
#
#     pull-with-curl.sh URL DIGEST DIR
#
# URL is that of the version: https://host/engines/phi3/any-checkpoint-fp8/1.0-01234567-89abcdef0123
# DIGEST is the package's: SHA-256 of its manifest.json. Get it from a source that you trust (a review, a
# deployment file), not from the same server: it stands in for the signature, which this script does
# not check. Nothing appears at DIR unless every byte is right. Needs curl, jq and sha256sum.
set -eu

url=${1:?URL of a version} digest=${2:?digest} dir=${3:?folder to make}
digest=${digest#sha256:}
[ ! -e "$dir" ] || { echo "$dir exists" >&2; exit 8; }
parent=$(dirname "$dir")
mkdir -p "$parent"
dir=$(cd "$parent" && pwd)/$(basename "$dir")
part=$(mktemp -d "$(dirname "$dir")/.pull-XXXXXX")
trap 'rm -rf "$part"' EXIT
cd "$part"

# No manifest is longer than 4 MiB. curl itself refuses a longer one only if the server says so.
curl --fail --silent --show-error --location --max-filesize 4194304 -o manifest.json \
    "$url/manifest.json"
echo "$digest  manifest.json" | sha256sum --check --status ||
    { echo "manifest.json has not the digest $digest" >&2; exit 4; }

# The digest vouches for the paths; refuse to leave the folder nevertheless.
jq -r '.files[].path' manifest.json | while IFS= read -r path; do
    case "/$path/" in
        */../* | *//*) echo "bad path $path" >&2; exit 4 ;;
        /engine/*) ;;
        *) echo "bad path $path" >&2; exit 4 ;;
    esac
    mkdir -p "$(dirname "$path")"
    encoded=$(printf %s "$path" | jq -sRr 'split("/") | map(@uri) | join("/")')
    curl --fail --silent --show-error --location --retry 5 -o "$path" "$url/$encoded"
done

jq -r '.files[] | "\(.sha256)  \(.path)"' manifest.json | sha256sum --check --quiet ||
    { echo "the files are not what manifest.json says" >&2; exit 4; }
find engine manifest.json -type f -exec chmod 444 {} +
cd /
chmod 755 "$part"
mv "$part" "$dir"
trap - EXIT
