//! What happens in the guest, as scripts that its disk has.

/// Upgrades packages: the newer files come over the guest's network from the port of the host that is named, one after the other, as apt would have
/// them come; none of them stays.
pub const UPGRADE: &str = r#"#!/bin/bash
set -e
port=$1
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
ip link set eth0 up
ip address replace 10.0.2.15/24 dev eth0
mkdir -p /run/upgrade
mount -t tmpfs -o size=200m upgrade /run/upgrade
cd /run/upgrade
tar -x --to-command='cat > next.deb; dpkg --force-unsafe-io --force-depends --force-confold --unpack next.deb </dev/null; rm next.deb' \
    < "/dev/tcp/10.0.2.2/$port" > log 2>&1 || { tail -n 5 log; exit 1; }
dpkg --force-unsafe-io --force-confold --configure -a > log 2>&1 </dev/null || { tail -n 5 log; exit 1; }
cd /
umount /run/upgrade
sync
"#;

/// An hour's work, which a seed decides: documents are edited, programs run, and memory is filled with what no disk has and what does not compress.
/// The memory stays with a process that goes on.
pub const WORK: &str = r#"#!/usr/bin/python3
import os, random, subprocess, sys, time

seed, documents, mib = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
words = [word for word in open('/usr/share/common-licenses/GPL-3').read().split() if word.isalpha()]
os.makedirs('/root/documents', exist_ok=True)
for number in range(documents):
    path = f'/root/documents/letter-{number}.txt'
    lines = open(path).read().split('\n') if os.path.exists(path) else []
    for _ in range(chance.randrange(20, 200)):
        at = chance.randrange(len(lines) + 1)
        lines.insert(at, ' '.join(chance.choices(words, k=12)))
    with open(path + '.new', 'w') as file:
        file.write('\n'.join(lines))
    os.replace(path + '.new', path)
programs = [
    ['perl', '-e', 'print length(join(q(), map { $_ * $_ } 1 .. 20000))'],
    ['openssl', 'dgst', '-sha256', '/usr/share/common-licenses/GPL-3'],
    ['sort', '/root/documents/letter-0.txt'],
    ['grep', '-rc', 'the', '/root/documents'],
    ['tar', '-cf', '/tmp/documents.tar', '-C', '/root', 'documents'],
    ['gzip', '-kf', '/tmp/documents.tar'],
]
for program in programs:
    subprocess.run(program, stdout=subprocess.DEVNULL, check=True)
if mib:
    try:
        os.kill(int(open('/run/held').read()), 9)
        os.remove('/run/held')
    except FileNotFoundError:
        pass
    if os.fork() == 0:
        os.setsid()
        held = bytearray(mib << 20)
        for at in range(0, mib << 20, 1 << 20):
            held[at:at + (1 << 20)] = chance.randbytes(1 << 20)
        with open('/run/held.new', 'w') as file:
            file.write(str(os.getpid()))
        os.rename('/run/held.new', '/run/held')
        while True:
            time.sleep(3600)
    while not os.path.exists('/run/held'):
        time.sleep(0.1)
"#;
