# Makes a small disk without cloud-init and without our agent: Debian's cloud kernel and busybox, which asks for an
# address by DHCP and serves; boots by BIOS.
# $1: an empty folder to work in. Leaves $1/disk.raw, without its first sector.
cd "$1"
package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
apt-get download -q -o APT::Sandbox::User=root "$package"
dpkg-deb -x "$package"_*.deb tree
release=${package#linux-image-}
mkdir -p init/bin init/srv/cgi-bin init/proc init/sys init/dev init/lib/modules/"$release" root
cp /bin/busybox init/bin/
for module in virtio virtio_ring virtio_pci virtio_pci_legacy_dev virtio_pci_modern_dev virtio_blk virtio_net \
    net_failover failover af_packet; do
    find tree/lib/modules -name $module.ko -exec cp {} init/lib/modules/"$release"/ \;
done
depmod -b init "$release"
cat > init/init <<'END'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
for module in virtio_pci virtio_blk virtio_net af_packet; do $b modprobe $module; done
$b ip link set lo up
$b ip link set eth0 up
$b udhcpc -i eth0 -q -f -t 50 -T 1 -s /bin/lease
$b httpd -p 80 -h /srv
while :; do $b sleep 1000; done
END
cat > init/bin/lease <<'END'
#!/bin/busybox sh
[ "$1" = bound ] || exit 0
/bin/busybox ip address add "$ip"/24 dev eth0
/bin/busybox ip route add default via "$router"
END
cat > init/srv/cgi-bin/write <<'END'
#!/bin/busybox sh
printf 'Content-Type: text/plain\r\n\r\n'
echo "$QUERY_STRING" | /bin/busybox dd of=/dev/vda bs=512 seek=100000 conv=fsync,notrunc 2> /dev/null
/bin/busybox dd if=/dev/vda bs=512 skip=100000 count=1 2> /dev/null | /bin/busybox head -n 1
END
echo 'hello from a small disk' > init/srv/index.html
chmod 755 init/init init/bin/lease init/srv/cgi-bin/write
(cd init && find . | busybox cpio -o -H newc) | gzip > root/initrd.img
cp tree/boot/vmlinuz-* root/vmlinuz
cat > early.cfg <<'END'
set root=(hd0,msdos1)
linux /vmlinuz console=ttyS0 net.ifnames=0 quiet panic=-1
initrd /initrd.img
boot
END
grub-mkimage -O i386-pc -o core.img -c early.cfg -p '(hd0,msdos1)/boot/grub' biosdisk part_msdos ext2 linux
truncate -s 64M disk.raw
mke2fs -q -t ext4 -m 0 -d root part 40M
dd if=core.img of=disk.raw bs=512 seek=1 conv=notrunc status=none
dd if=part of=disk.raw bs=1M seek=1 conv=notrunc,sparse status=none
rm -rf root part tree init ./*.deb
