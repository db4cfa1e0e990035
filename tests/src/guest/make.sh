#!/bin/sh
# Makes the guest that tests of machines boot: vmlinuz (Debian's cloud kernel) and initrd (busybox, virtio's modules, `init`).
#
#   make.sh OUT      OUT has `init`, and an empty directory `work`
#
# All but apt-get, dpkg-deb and gzip comes from packages that are unpacked here and not installed.
set -eu

out=$1
work=$out/work

fail() {
    echo "$*" >&2
    exit 1
}

for tool in apt-get apt-cache dpkg-deb gzip; do
    command -v "$tool" >/dev/null || fail "$tool is missing: the test guest is made from Debian's packages"
done

# apt gives up its privileges for a download, and is to reach the directory all the same.
chmod 755 "$out" "$work"
unpack() {
    (cd "$work" && apt-get download -q "$1" >"$work/log" 2>&1) || {
        cat "$work/log" >&2
        fail "$1 cannot be downloaded: run apt-get update"
    }
    dpkg-deb -x "$work/$1"_*.deb "$work/$2"
}

# The meta package names the kernel of the day.
kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)
[ -n "$kernel" ] || fail "apt-get knows no package linux-image-cloud-amd64: run apt-get update, on Debian for amd64"
unpack "$kernel" kernel
unpack busybox-static busybox
busybox=$(find "$work/busybox" -type f -path "*/bin/busybox" | head -n 1)

version=$(ls "$work"/kernel/lib/modules 2>/dev/null || ls "$work"/kernel/usr/lib/modules)
from=$(find "$work/kernel" -type d -path "*/modules/$version")
root=$work/root
to=$root/lib/modules/$version
mkdir -p "$root/bin" "$root/dev" "$root/mnt" "$root/proc" "$root/sys" "$root/tmp" "$to"

# Modules, with what they need. One that is not found is built into the kernel.
if [ "$from" != "$work/kernel/lib/modules/$version" ]; then
    ln -s usr/lib "$work/kernel/lib"
fi
"$busybox" depmod -b "$work/kernel" "$version"
add() {
    mkdir -p "$to/$(dirname "$1")"
    cp "$from/$1" "$to/$1"
}
for module in button evdev virtio_pci virtio_blk virtio_balloon virtio_console virtio_net virtio-rng ext4; do
    file=$(cd "$from" && find . -name "$module.ko*" | sed 's|^\./||' | head -n 1)
    [ -n "$file" ] || continue
    add "$file"
    for needed in $(sed -n "s|^$file: *||p" "$from/modules.dep"); do
        add "$needed"
    done
done
"$busybox" depmod -b "$root" "$version"

cp "$busybox" "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
cp "$out/init" "$root/init"
chmod 755 "$root/init"

(cd "$root" && find . | "$busybox" cpio -o -H newc -R 0:0 2>/dev/null | gzip -1) >"$out/initrd"
cp "$work/kernel/boot/vmlinuz-$version" "$out/vmlinuz"
