// Package step names the places in daemon and shim where a process that is
// killed leaves one of two things done. Recovery has to be right after each of
// them, so each has a name here and nowhere else.
//
// In a build with the tag failpoint a step can kill, stop, delay or fail (see
// failpoint.go); in any other build Reach costs nothing.
package step

// Step is the name of one place. It says what has just been done.
type Step string

// Creation and removal of a pod, in the daemon.
const (
	PodRecord     Step = "pod-record"     // its record says creating
	PodNamespaces Step = "pod-namespaces" // namespaces and files are there
	PodIntent     Step = "pod-intent"     // its record says that ADD may run
	PodNetwork    Step = "pod-network"    // ADD has run, its result is not on record
	PodAttached   Step = "pod-attached"   // the result is on record
	PodInit       Step = "pod-init"       // its init runs, and is not pinned
	PodPinned     Step = "pod-pinned"     // its init's pid namespace is pinned, which is not on record
	PodPlugins    Step = "pod-plugins"    // plugins know of it, its record says creating
	PodReady      Step = "pod-ready"      // its record says ready, no answer was given
	PodUpdated    Step = "pod-updated"    // other resources are on record, no answer was given
	PodFrozen     Step = "pod-frozen"     // its containers are frozen, none is saved
	PodThawed     Step = "pod-thawed"     // all are saved and run, no file has a name
	PodArchive    Step = "pod-archive"    // the first file of its checkpoint has its name
	PodArchived   Step = "pod-archived"   // all have, the records say that they are being made
	PodRestoring  Step = "pod-restoring"  // it is ready and has none of the containers that it is restored with
	PodRestored   Step = "pod-restored"   // it has all of them, no answer was given
	PodStopping   Step = "pod-stopping"   // its record says stopping
	PodKilled     Step = "pod-killed"     // its containers have ended
	PodDetached   Step = "pod-detached"   // DEL has run, which is not on record
	PodStopped    Step = "pod-stopped"    // its record says stopped
	PodErased     Step = "pod-erased"     // all but its record is gone
)

// Creation, start and removal of a container, in the daemon.
const (
	ContainerImage    Step = "container-image"    // its layers are held
	ContainerRecord   Step = "container-record"   // its record says creating
	ContainerPlugins  Step = "container-plugins"  // plugins have changed its spec, which is not on record
	ContainerRoot     Step = "container-root"     // its root is mounted, its spec made
	ContainerShim     Step = "container-shim"     // its shim runs, and has no container
	ContainerRuntime  Step = "container-runtime"  // the shim has created it
	ContainerCreated  Step = "container-created"  // its record says created, no answer was given
	ContainerStarted  Step = "container-started"  // the shim has started it, no answer was given
	ContainerUpdating Step = "container-updating" // its record says that an update may be under way
	ContainerUpdated  Step = "container-updated"  // the shim has new resources, which is not on record
	ContainerReopened Step = "container-reopened" // the shim has opened its log anew, no answer was given
	ContainerStopping Step = "container-stopping" // the shim has the deadline of its stop, no answer was given
	ContainerFreezing Step = "container-freezing" // its record says that a checkpoint may be under way
	ContainerFrozen   Step = "container-frozen"   // it is frozen, nothing is saved
	ContainerSaved    Step = "container-saved"    // it is saved and still frozen, there is no archive
	ContainerThawed   Step = "container-thawed"   // it runs, there is no archive
	ContainerArchived Step = "container-archived" // the archive is there, the record says that it is being made
	ContainerRemoving Step = "container-removing" // its record says removing
	ContainerEnded    Step = "container-ended"    // its shim and its processes are gone
	ContainerBuried   Step = "container-buried"   // what a dead shim left is killed, no exit record
	ContainerErased   Step = "container-erased"   // all but its record is gone
)

// Sessions and events, in the daemon.
const (
	SessionToken  Step = "session-token"  // a token is on file, nobody knows whether sessions are served
	SessionServed Step = "session-served" // holdfast-stream runs, no answer was given
	EventSending  Step = "event-sending"  // something has happened, one subscriber was not told
)

// Sessions, in holdfast-stream.
const (
	StreamLocked    Step = "stream-locked"    // it has its lock, and does not listen
	StreamAnnounced Step = "stream-announced" // it listens, the daemon was not told
	StreamTaken     Step = "stream-taken"     // a token is used, there is no session
	StreamOpened    Step = "stream-opened"    // there is one, its client has nothing of it
)

// Creation, start, stop and end of a container, and an exec, in its shim.
const (
	ShimCreating      Step = "shim-creating"       // state.json says creating, the OCI runtime has not run
	ShimRuntime       Step = "shim-runtime"        // init is there, which is not on record
	ShimCreated       Step = "shim-created"        // state.json says created, no answer was given
	ShimReleased      Step = "shim-released"       // init runs the program, which is not on record
	ShimStarted       Step = "shim-started"        // state.json says running, no answer was given
	ShimStopping      Step = "shim-stopping"       // the stop is on record, no signal was sent
	ShimSignalled     Step = "shim-signalled"      // the stop signal was sent, which is not on record
	ShimReopened      Step = "shim-reopened"       // the log was opened anew, no answer was given
	ShimExecRecord    Step = "shim-exec-record"    // an exec has its record, and does not run
	ShimExecStarted   Step = "shim-exec-started"   // it runs, which is not on record
	ShimSession       Step = "shim-session"        // a socket waits for the client of an exec, which does not run
	ShimExecEnded     Step = "shim-exec-ended"     // an exec has ended, nobody was told
	ShimUpdated       Step = "shim-updated"        // the kernel has new resources, which is not on record
	ShimUpdateKept    Step = "shim-update-kept"    // update.json says so, no answer was given
	ShimFrozen        Step = "shim-frozen"         // it is frozen for a checkpoint, no answer was given
	ShimSaved         Step = "shim-saved"          // the OCI runtime has saved it, no answer was given
	ShimExitSeen      Step = "shim-exit-seen"      // init is a zombie, there is no exit record
	ShimExitRecorded  Step = "shim-exit-recorded"  // exit.json is there, init is not reaped
	ShimReaped        Step = "shim-reaped"         // init is reaped, the output is not drained
	ShimExitAnnounced Step = "shim-exit-announced" // state.json says exited, nothing is removed
	ShimCleaned       Step = "shim-cleaned"        // what the OCI runtime kept and the cgroups are removed
)
