from tests.test_pipeline import make_pipeline
from vgen.models.compilation import compile_blocks


def test_compilation_is_announced_once_with_its_usual_time(caplog):
    compile_blocks(make_pipeline().denoiser)
    (message,) = caplog.messages
    assert message.startswith("SpacetimeTransformer is compiled in its first steps, which takes one or two minutes")
