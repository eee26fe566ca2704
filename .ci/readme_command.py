"""Print the README's shell block marked `<!-- command: NAME -->`, exactly as a newcomer would paste it."""

import re
import sys
from pathlib import Path

readme, name = Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2]
found = re.search(rf"<!-- command: {name} -->\s*```bash\n(.*?)```", readme, re.DOTALL)
if found is None:
    sys.exit(f"README.md has no block marked '<!-- command: {name} -->'")
print(found.group(1))
