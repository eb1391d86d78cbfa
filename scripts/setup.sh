# Sourced by demo.sh and test.sh: makes .venv in the repository if it is missing and installs the tested set into it.
# Set PYTHON to use another interpreter than python3 for the environment.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
if [ ! -x .venv/bin/python ]; then
  echo "== making .venv"
  "${PYTHON:-python3}" -m venv .venv
fi
stamp=.venv/installed
want=$(cat requirements.txt pyproject.toml | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
  echo "== installing requirements.txt and this package into .venv"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
  echo "$want" > "$stamp"
fi
export PATH="$root/.venv/bin:$PATH"
