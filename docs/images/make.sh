#!/bin/sh
# Draws replay.png: the top of the page that `make demo` writes.
#
#   make picture
#
# The arguments are those of `sagellm replay`. Needs the virtual environment of `make demo`, and Chromium (another name or path: CHROMIUM=...).
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${VENV:-.venv}/bin/sagellm" replay --report "$work/report.html" "$@"

# Of the charts only the first row stays, so that the picture does not end in the middle of one.
sed 's|</style>|section:nth-of-type(n+3), .chart:nth-of-type(n+3) { display: none; }</style>|' \
  "$work/report.html" > "$work/top.html"

sandbox=
if [ "$(id -u)" -eq 0 ]; then
  sandbox=--no-sandbox # Chromium does not start for root with it.
fi
"${CHROMIUM:-chromium}" --headless=new $sandbox --disable-gpu --hide-scrollbars --user-data-dir="$work/profile" \
  --blink-settings=preferredColorScheme=1 --force-device-scale-factor=1.15 --window-size=1280,1490 \
  --screenshot="$work/replay.png" "file://$work/top.html" 2> "$work/chromium.log" || {
  cat "$work/chromium.log" >&2
  exit 1
}
mv "$work/replay.png" docs/images/replay.png
