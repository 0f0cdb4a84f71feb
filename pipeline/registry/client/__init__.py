"""Pull a package: choose it, believe it, fetch it, lay it out.

    pull.py      the straight line, and the Python API
    machine.py   facts of the machine that will run the engine: given, probed or unknown
    resolve.py   a reference -> the published versions that it may mean
    examine.py   their manifests and signatures, before any large byte
    select.py    which of them fits the machine best, and why the others do not; pure
    download.py  pieces in parallel, resumed and verified
    pieces.py    one file while it lands; the journal of what has landed
    owned.py     private folders whose owner may die, and be followed by the next
    cache.py     one copy per digest for everybody on this machine
    layout.py    the folder that a runtime mounts
    receipt.py   what was pulled, what was believed, and what nobody knew
    command.py   what `enginesmith pull` does, less the command line

Light: no torch, no numpy; a store's own library is imported by that store.
"""
