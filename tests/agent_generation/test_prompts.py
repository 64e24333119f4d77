import hashlib
from pathlib import Path

from jinja2 import meta, nodes

import agent_generation.prompts
from agent_generation.prompts import LANGUAGES, VERSION, environment


FOLDER = Path(agent_generation.prompts.__file__).parent
DIGESTS = {"2": "38f717d9db46a94f"}  # of each version's templates; an older one's may go


def test_a_version_names_the_prompts():
    digest = hashlib.sha256()
    for file in sorted(FOLDER.rglob("*.jinja")):
        digest.update(file.relative_to(FOLDER).as_posix().encode() + file.read_bytes())
    assert digest.hexdigest()[:16] == DIGESTS[VERSION], "templates changed: raise VERSION and note its digest here"


def test_the_languages_ask_the_same_questions_of_the_same_data():
    names = [{file.name for file in (FOLDER / language).iterdir()} for language in LANGUAGES]
    assert all(other == names[0] for other in names)
    for name in names[0]:
        used = [uses((FOLDER / language / name).read_text("utf-8")) for language in LANGUAGES]
        assert all(other == used[0] for other in used), name


def uses(template):
    """The values that a template shows or tests, with their fields."""
    tree = environment().parse(template)
    fields = {
        (node.node.name, node.attr) for node in tree.find_all(nodes.Getattr) if isinstance(node.node, nodes.Name)
    }
    return meta.find_undeclared_variables(tree), fields
