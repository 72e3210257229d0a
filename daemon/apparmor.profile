# What a container may do that is not given another profile. Its files, its network and its
# capabilities are the business of namespaces and of other rules; this one keeps it from the
# kernel's settings, from mounting, and from processes outside.
profile holdfast-default flags=(attach_disconnected, mediate_deleted) {
  file,
  network,
  capability,
  umount,

  # Whoever is outside may end it, and look at it.
  signal (receive),
  signal (send) peer=holdfast-default,
  ptrace (readby, tracedby),
  ptrace (read, trace) peer=holdfast-default,

  deny mount,

  # Settings of the node. Those of the IPC and network namespaces are the container's own.
  deny /proc/sys/{abi,crypto,debug,dev,sunrpc,user,vm}/** wklx,
  deny /proc/sys/fs/[^m]** wklx,
  deny /proc/sys/fs/m[^q]** wklx,
  deny /proc/sys/kernel/[^ms]** wklx,
  deny /proc/sys/kernel/m[^s]** wklx,
  deny /proc/sys/kernel/s[^eh]** wklx,
  deny /proc/sys/kernel/se[^m]** wklx,
  deny /proc/sys/kernel/sh[^m]** wklx,

  # The machine itself.
  deny /proc/{kcore,kmem,mem,sysrq-trigger} rwklx,
  deny /proc/{acpi,bus,driver,irq,mtrr,scsi,timer_list}{,/**} wklx,
  deny /sys/{block,bus,class,dev,devices,hypervisor,module,power}/** wklx,
  deny /sys/fs/{bpf,ext4,fuse,pstore,selinux,smackfs,xfs}/** wklx,
  deny /sys/kernel/** wklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/{firmware,kernel/debug,kernel/security,kernel/tracing}/** rwklx,
}
