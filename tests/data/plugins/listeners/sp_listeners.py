from sharpness_plugins.registry import hookimpl

heard = []


class Quiet:
    def __init__(self, name):
        self.name = name

    @hookimpl
    def sharpness_measure_end(self, report):
        heard.append((self.name, report))
        return self.name

    @hookimpl
    def sharpness_resolve_loss(self, batch):
        heard.append((self.name, batch))
        return None if batch == "unknown" else f"{self.name}: {batch}"


class Loud:
    @hookimpl
    def sharpness_measure_end(self):
        raise SystemExit(3)

    @hookimpl
    def sharpness_resolve_loss(self, model, criterion):
        raise ValueError("what is this?")


quiet, loud, second = Quiet("first"), Loud(), Quiet("second")
