// Runs gVisor's own inbound dispatchers on a descriptor, controlled over standard input and output.
//
//	gvisor FD MODE PACKETS
//
// MODE is readv, recvmmsg or mmap. Attach starts a goroutine that receives as soon as there is a packet. The delivery of the
// last of PACKETS does not return, so that a queue can be filled. For each line "drain" or "check" it returns. After PACKETS
// more deliveries the program prints the nanoseconds that they took, their bytes, with "check" their Adler-32, and how often
// another thread got the processor. The first PACKETS are delivered before any line is read, and reported with one line.
//
// With PACKETS 0 delivery always returns. A line "count" is answered with the packets so far and the processor time of
// this process in nanoseconds.
package main

import (
	"bufio"
	"fmt"
	"hash/adler32"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/link/fdbased"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

var modes = map[string]fdbased.PacketDispatchMode{
	"readv":    fdbased.Readv,
	"recvmmsg": fdbased.RecvMMsg,
	"mmap":     fdbased.PacketMMap,
}

type result struct {
	at    time.Time
	bytes int
	check uint32
}

// counter is the network stack to which the endpoint delivers.
type counter struct {
	wanted, packets uint64
	bytes           int
	checked         bool
	done            chan result
	more            chan bool
	check           interface {
		Write([]byte) (int, error)
		Sum32() uint32
		Reset()
	}
}

func (c *counter) DeliverNetworkPacket(_ tcpip.NetworkProtocolNumber, packet stack.PacketBufferPtr) {
	if c.wanted == 0 {
		atomic.AddUint64(&c.packets, 1)
		return
	}
	c.packets++
	c.bytes += packet.Size()
	if c.checked {
		for _, part := range packet.AsSlices() {
			c.check.Write(part)
		}
	}
	if c.packets == c.wanted {
		c.done <- result{time.Now(), c.bytes, c.check.Sum32()}
		c.packets, c.bytes = 0, 0
		c.check.Reset()
		c.checked = <-c.more
	}
}

func (*counter) DeliverLinkPacket(tcpip.NetworkProtocolNumber, stack.PacketBufferPtr, bool) {}

func main() {
	fd, _ := strconv.Atoi(os.Args[1])
	wanted, _ := strconv.ParseUint(os.Args[3], 10, 64)
	endpoint, err := fdbased.New(&fdbased.Options{
		FDs:                []int{fd},
		MTU:                65535,
		EthernetHeader:     true,
		PacketDispatchMode: modes[os.Args[2]],
	})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	c := &counter{wanted: wanted, done: make(chan result, 1), more: make(chan bool), check: adler32.New()}
	endpoint.Attach(c)
	fmt.Println("attached")
	if wanted > 0 {
		<-c.done
		fmt.Println("warm")
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		if wanted == 0 {
			var used syscall.Rusage
			syscall.Getrusage(syscall.RUSAGE_SELF, &used)
			fmt.Println(atomic.LoadUint64(&c.packets), used.Utime.Nano()+used.Stime.Nano())
			continue
		}
		var before, after syscall.Rusage
		syscall.Getrusage(syscall.RUSAGE_SELF, &before)
		start := time.Now()
		c.more <- lines.Text() == "check"
		r := <-c.done
		syscall.Getrusage(syscall.RUSAGE_SELF, &after)
		fmt.Println(r.at.Sub(start).Nanoseconds(), r.bytes, r.check, after.Nivcsw-before.Nivcsw)
	}
}
