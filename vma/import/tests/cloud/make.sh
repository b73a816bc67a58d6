# Makes a disk as cloud images are: Debian, its cloud kernel, cloud-init, a small web server; boots by BIOS.
# $1: an empty folder to work in. Leaves $1/disk.raw, without its first sector.
cd "$1"
mmdebstrap --mode=root --variant=apt --format=directory \
    --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --include=systemd-sysv,udev,dbus,iproute2,linux-image-cloud-amd64,initramfs-tools,zstd,cloud-init,netplan.io,busybox-static \
    bookworm root
printf '/dev/vda1 / ext4 errors=remount-ro 0 1\n' > root/etc/fstab
mkdir -p root/srv/www/cgi-bin
echo 'hello from a cloud image' > root/srv/www/index.html
printf '#!/bin/busybox sh\nprintf "Content-Type: text/plain\\r\\n\\r\\n"\nhead -c 16 /dev/urandom | od -An -tx1 | tr -d " \\n"\necho\ndate +%%s\n' > root/srv/www/cgi-bin/random
printf '#!/bin/busybox sh\nprintf "Content-Type: text/plain\\r\\n\\r\\n"\necho "$QUERY_STRING" >> /srv/written\nsync\ncat /srv/written\n' > root/srv/www/cgi-bin/write
chmod 755 root/srv/www/cgi-bin/*
printf '[Unit]\nAfter=network.target\n[Service]\nExecStart=/bin/busybox httpd -f -p 80 -h /srv/www\n[Install]\nWantedBy=multi-user.target\n' > root/etc/systemd/system/web.service
chroot root systemctl enable web systemd-networkd
: > root/etc/machine-id
rm -rf root/var/cache/apt/archives/*.deb root/var/lib/apt/lists/*
cat > early.cfg <<'END'
set root=(hd0,msdos1)
linux /vmlinuz root=/dev/vda1 ro console=ttyS0 net.ifnames=0 quiet
initrd /initrd.img
boot
END
grub-mkimage -O i386-pc -o core.img -c early.cfg -p '(hd0,msdos1)/boot/grub' biosdisk part_msdos ext2 linux
truncate -s 1024M disk.raw
mke2fs -q -t ext4 -m 0 -d root part 1023M
dd if=core.img of=disk.raw bs=512 seek=1 conv=notrunc status=none
dd if=part of=disk.raw bs=1M seek=1 conv=notrunc,sparse status=none
rm -rf root part
