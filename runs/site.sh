#!/usr/bin/env bash
# The course as a web site: README, lessons, the system's notebooks, assignments, API pages, search. About a minute.
#
#   bash runs/site.sh [--serve] [OUT]
#
#   OUT        the folder to write (default _site); nothing in it points outside, and it works under any sub-path
#   --serve    show it on http://127.0.0.1:8008 afterwards
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. runs/_env.sh

out=_site serve=0
for a in "$@"; do
    case $a in
        --serve) serve=1 ;;
        -h|--help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        -*) die "unknown flag $a; there is --serve, and a folder to write" ;;
        *) out=$a ;;
    esac
done
trap 'printf "\nstopped; a site that was there before is as it was\n" >&2; exit 130' INT

install dev
say "Building the site into $out"
python dev/site.py "$out"
[ $serve = 0 ] || exec python -m http.server --bind 127.0.0.1 --directory "$out" 8008
