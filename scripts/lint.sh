#!/usr/bin/env bash
# Formatting, Python lint, the include rules and sizes; `scripts/lint.sh --fix` formats. Exits non-zero on any finding.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
fix=false
[ "${1:-}" = --fix ] && fix=true
failed=0
complain() { printf 'lint: %s\n' "$1"; failed=1; }

mapfile -t cpp < <(git ls-files --cached --others --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh' '*.inc' | while read -r f; do [ -f "$f" ] && echo "$f"; done)
if $fix; then
  $bin/clang-format -i "${cpp[@]}"
  $bin/ruff check --fix -q . || true
  $bin/ruff format -q .
fi
$bin/clang-format --dry-run -Werror "${cpp[@]}" 2>/tmp/lint.$$ || { grep -m 5 error /tmp/lint.$$; complain "not as clang-format would have it; run scripts/lint.sh --fix"; }
rm -f /tmp/lint.$$
$bin/ruff check -q . || complain "ruff check found what stands above"
$bin/ruff format --check -q . || complain "not as ruff format would have it; run scripts/lint.sh --fix"

# Kernels know no torch; operators know nothing above them.
if grep -nE '#include [<"](ATen|torch|c10)/' kernels/*; then complain "kernels/ includes torch"; fi
if grep -rnE '#include "(core|report|checkpoint|text|cache|model|selector|selection|attention|benchmark|distill|engine|eval|grammar|server|cli)/' kernels ops; then
  complain "kernels/ or ops/ includes a header of src/"
fi
for f in "${cpp[@]}" $(git ls-files '*.py'); do
  [ -f "$f" ] || continue
  [ "$(wc -l <"$f")" -le 650 ] || complain "$f has more than 650 lines"
done
while read -r f; do
  case "$f" in models/*) continue ;; esac
  [ ! -f "$f" ] || [ "$(stat -c %s "$f")" -le 500000 ] || complain "$f is larger than 500 KB"
done < <(git ls-files)
[ $failed = 0 ] && echo "lint: clean"
exit $failed
